#!/usr/bin/env bash
# Installs what drctl's lab, demo and tests need and this machine lacks: Debian packages, then a virtual environment.
# Prints the list first, installs nothing else, starts no service. Done again, it does nothing.
#
#   setup.sh [--long] [VENV]   set up; VENV as --where says without it. --long: also what only long tests need
#   setup.sh --where           print where the virtual environment belongs
#
# Exit codes: 0 done, 43 this machine can't run drctl (the reason is printed).
set -euo pipefail
cd "$(dirname "$0")"
here=$PWD

packages=(qemu-system-x86 qemu-utils qemu-block-extra libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients
          libvirt-dev pkg-config gcc libc6-dev python3-dev python3-venv fio nbdkit libnbd-bin busybox-static
          syslinux syslinux-common mtools dosfstools e2fsprogs fdisk openssh-server
          libglib2.0-0 libnuma1 liburing2 libudev1)
# UEFI firmware and TPMs for guests, a network with DHCP: without them these long tests are skipped.
long_packages=(ovmf swtpm swtpm-tools tpm2-tools dnsmasq-base iproute2)
# Ubuntu 24.04 renamed it with the change to 64-bit time.
renamed=([0]=libglib2.0-0:libglib2.0-0t64)

refuse() {
    echo "setup: $1" >&2
    exit 43
}

# Everything in a lab runs as the unprivileged user drctl-lab when root makes it. That user must be able to read the
# virtual environment, so it can't lie below e.g. /root.
readable_by_all() {
    local directory=$here
    while [[ $directory != / ]]; do
        [[ $(stat -c %a "$directory") =~ [1357]$ ]] || return 1
        directory=$(dirname "$directory")
    done
}

where() {
    if [[ $(id -u) != 0 ]] || readable_by_all; then
        echo "$here/.venv"
    else
        echo "/opt/drctl-venv-$(sha256sum <<<"$here" | cut -c1-8)"
    fi
}

as_root() {
    if [[ $(id -u) = 0 ]]; then "$@"; else sudo "$@"; fi
}

may_install() {
    [[ $(id -u) = 0 ]] || command -v sudo >/dev/null
}

installed() {
    [[ $present == *" $1 "* ]]
}

candidate() {
    apt-cache policy "$1" 2>/dev/null | awk '$1 == "Candidate:" && $2 != "(none)" {print $2}'
}

# need NAME VERSION-FOUND OLDEST: a version may carry an epoch and a Debian revision.
need() {
    local found=${2#*:}
    [[ -n $found ]] || refuse "this distribution has no $1"
    dpkg --compare-versions "$found" ge "$3" || refuse "$1 is $found here; drctl needs $3 or newer"
}

missing_packages() {
    local package pair present
    present=" $(dpkg-query -W -f '${db:Status-Abbrev} ${Package}\n' | awk '$1 == "ii" {printf "%s ", $2}')"
    for package in "${packages[@]}"; do
        for pair in "${renamed[@]}"; do
            if [[ $package = "${pair%%:*}" ]] && { installed "${pair##*:}" || [[ -z $(candidate "$package") ]]; }; then
                package=${pair##*:}
            fi
        done
        installed "$package" || echo "$package"
    done
}

# A policy-rc.d that says "no" (101) keeps the packages' scripts from starting anything; the machine's own comes back.
policy=/usr/sbin/policy-rc.d
restore_policy() {
    as_root rm -f $policy
    if [[ -e $policy.drctl-setup ]]; then as_root mv $policy.drctl-setup $policy; fi
}

install_packages() {
    echo "setup: Debian packages to install: $*"
    may_install || refuse "that needs root, and there is no sudo; as root: apt-get install --no-install-recommends $*"
    # Two at once would take each other's policy-rc.d for the machine's own. dpkg's locks are of another kind (fcntl).
    exec 9</var/lib/dpkg
    flock 9
    as_root apt-get update -qq
    need qemu-system-x86 "$(candidate qemu-system-x86)" 7.2
    need libvirt-daemon "$(candidate libvirt-daemon)" 9.0
    trap restore_policy EXIT
    if [[ -e $policy && ! -e $policy.drctl-setup ]]; then as_root mv $policy $policy.drctl-setup; fi
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
    as_root chmod 755 $policy
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "$@" >/dev/null
    restore_policy
    trap - EXIT
    exec 9<&-
}

make_environment() {
    local venv=$1 python how sources stamp
    python=$(/usr/bin/python3 -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    how=-e
    sources=$(cat pyproject.toml)
    if [[ $venv != "$here/.venv" ]] && [[ $(id -u) = 0 ]] && ! readable_by_all; then
        how= # a copy: the checkout can't be read by the lab's user; made anew when the sources change
        sources=$(cat pyproject.toml <(find drctl -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum))
    fi
    stamp="$venv/.setup-$(sha256sum <<<"$python $how $sources" | cut -c1-16)"
    if [[ -e $stamp ]]; then return; fi
    # The lab's guest boots the distribution's kernel, which apt must know (it is unpacked, never installed).
    if [[ -z $(candidate linux-image-cloud-amd64)$(candidate linux-image-virtual) ]] && may_install; then
        echo "setup: reading the package lists"
        as_root apt-get update -qq
    fi
    echo "setup: virtual environment in $venv (from /usr/bin/python3): drctl and the packages of pyproject.toml"
    # The distribution may have moved to a newer Python since.
    [[ -x $venv/bin/python && -d $venv/lib/$python ]] || /usr/bin/python3 -m venv --clear "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check ${how:+"$how"} '.[dev]'
    if [[ -z $how ]]; then "$venv/bin/pip" install -q --disable-pip-version-check --force-reinstall --no-deps .; fi
    rm -f "$venv"/.setup-*
    touch "$stamp"
}

if [[ ${1:-} = --where ]]; then
    where
    exit
fi
if [[ ${1:-} = --long ]]; then
    packages+=("${long_packages[@]}")
    shift
fi
command -v apt-get >/dev/null || refuse "this is no Debian or Ubuntu; install what README.md lists by hand"
mapfile -t missing < <(missing_packages)
if ((${#missing[@]})); then install_packages "${missing[@]}"; fi
need QEMU "$(qemu-system-x86_64 --version | awk 'NR == 1 {print $4}')" 7.2
need libvirt "$(libvirtd --version | awk '{print $NF}')" 9.0
need Python "$(/usr/bin/python3 -c 'import platform; print(platform.python_version())')" 3.11
make_environment "$(realpath -m "${1:-$(where)}")"
