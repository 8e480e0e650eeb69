#!/usr/bin/env bash
# Installs what drctl's lab, demo and tests need and this machine lacks. Prints the list first; installs nothing else;
# starts no system service. Usage: setup.sh VENV
set -euo pipefail
venv=$1
cd "$(dirname "$0")"
packages=(qemu-system-x86 qemu-utils qemu-block-extra libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients
          libvirt-dev pkg-config gcc libc6-dev python3-dev python3-venv fio nbdkit libnbd-bin busybox-static
          syslinux syslinux-common extlinux mtools dosfstools e2fsprogs fdisk)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
    echo "setup: Debian packages to install: ${missing[*]}"
    sudo=(); [[ $(id -u) = 0 ]] || sudo=(sudo)
    "${sudo[@]}" apt-get update -qq
    # RUNLEVEL and policy-rc.d keep package scripts from starting services.
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
stamp="$venv/.setup-$(sha256sum pyproject.toml | cut -c1-16)"
if [[ ! -e $stamp ]]; then
    echo "setup: virtual environment in $venv (from /usr/bin/python3): drctl and the packages of pyproject.toml"
    [[ -x $venv/bin/python ]] || /usr/bin/python3 -m venv "$venv"
    "$venv/bin/pip" install -q -e '.[dev]'
    touch "$stamp"
fi
