#!/usr/bin/env bash
# Runs a command in a clone of this checkout's HEAD, on a Debian that has git and make and nothing else. Needs root,
# debootstrap, and unshare of util-linux. The root has mounts, processes, /dev, /run and /tmp of its own and no /dev/kvm.
#
#   tests/fresh_root.sh [OPTION...] ROOT PLACE COMMAND...
#
# ROOT is made when it isn't there, and stays; PLACE in it is cloned when it isn't there. Run again, both are as the last
# run left them. What the command leaves running or lying about is told at the end.
#
#   --suite NAME     of Debian, for a new root (bookworm)
#   --mirror URL     for a new root; debootstrap's own without it
#   --user NAME      run the command as this user, made when absent, to whom PLACE belongs
#   --offline        no network but loopback
#   --bind PATH      show this path of the machine in the root, read-only: certificates or settings for a proxy
#
# Exit codes: the command's, or 42 when the root could not be made.
set -euo pipefail

suite=bookworm mirror='' user=root offline='' binds=()
while [[ ${1:-} = --* ]]; do
    case $1 in
        --suite) suite=$2 && shift 2 ;;
        --mirror) mirror=$2 && shift 2 ;;
        --user) user=$2 && shift 2 ;;
        --bind) binds+=("$2") && shift 2 ;;
        --offline) offline=yes && shift ;;
        *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 2 ;;
    esac
done
(($# >= 3)) || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit 2; }
checkout=$(realpath "$(dirname "$0")/..") root=$(realpath -m "$1") place=$2
shift 2

make_root() {
    echo "fresh_root: debootstrap $suite in $root"
    mkdir -p "$root"
    debootstrap --variant=minbase --include=git,make,ca-certificates "$suite" "$root" ${mirror:+"$mirror"} >"$root.log" ||
        { tail -n 5 "$root.log" && exit 42; }
    rm -f "$root.log"
    printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
}

clone() {
    local branch
    branch=$(git -C "$checkout" symbolic-ref -q HEAD || true)
    git -C "$checkout" bundle create -q "$root/source.bundle" HEAD ${branch:+"$branch"}
    chroot "$root" git clone -q /source.bundle "$place"
    rm "$root/source.bundle"
}

show() { # DEVICE-OR-PATH: the machine's own, at the same place in the root
    mkdir -p "$root$(dirname "$1")"
    if [[ -d $1 ]]; then mkdir -p "$root$1"; else [[ -e $root$1 ]] || touch "$root$1"; fi
    mount --bind "$1" "$root$1"
}

mount_all() {
    local path
    mount --make-rprivate /
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    for path in dev run tmp; do mount -t tmpfs -o mode=755 tmpfs "$root/$path"; done
    chmod 1777 "$root/tmp"
    mkdir -m 1777 "$root/dev/shm" "$root/run/lock"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mkdir "$root/dev/pts"
    mount -t devpts -o newinstance,ptmxmode=666,gid=5 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"
    ln -s /proc/self/fd "$root/dev/fd"
    for path in null zero full random urandom tty; do show "/dev/$path"; done
    for path in "${binds[@]}"; do
        show "$path"
        mount -o remount,bind,ro "$root$path"
    done
}

leftovers() {
    local directory found
    for directory in /proc/[0-9]*; do
        found=$({ tr '\0' ' ' <"$directory/cmdline"; } 2>/dev/null) || continue # it ended meanwhile
        [[ ${directory#/proc/} = "$$" || -z $found ]] || echo "fresh_root: still runs: ${directory#/proc/} ${found::150}"
    done
    find "$root"/{tmp,var/tmp,dev/shm} -mindepth 1 -maxdepth 1 -printf 'fresh_root: left: /%P in %h\n'
}

inside() { # the first process of the new namespaces
    local code=0 home
    if [[ -n $offline ]]; then ip link set lo up 2>/dev/null || python3 -c "$loopback_up"; fi
    mount_all
    home=$(chroot "$root" bash -c "echo ~$user")
    # No machine has these from its login: what a proxy needs is handed on by name, nothing else is.
    mapfile -t settings < <(env | grep -E '^(PIP_[A-Z_]*|[a-z]+_proxy|SSL_CERT_FILE|CI)=' || true)
    mount -t proc proc /proc
    chroot --userspec="$user" "$root" env -i HOME="$home" USER="$user" LOGNAME="$user" TERM=dumb \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "${settings[@]}" \
        bash -c 'cd "$0" && exec "$@"' "$place" "$@" </dev/null || code=$?
    leftovers
    exit "$code"
}

# ip(8) may be absent: SIOCSIFFLAGS (0x8914) with IFF_UP on lo, netdevice(7).
loopback_up='import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 1))'

[[ -n ${FRESH_ROOT_INSIDE:-} ]] && inside "$@"
[[ $(id -u) = 0 ]] || { echo "fresh_root: needs root" >&2 && exit 42; }
[[ -e $root/etc/debian_version ]] || make_root
if [[ $user != root ]] && ! grep -q "^$user:" "$root/etc/passwd"; then chroot "$root" useradd -m -s /bin/bash "$user"; fi
[[ -e $root$place ]] || clone
chroot "$root" chown -R "$user": "$place"
export FRESH_ROOT_INSIDE=yes
options=(--user "$user" ${offline:+--offline})
for path in "${binds[@]}"; do options+=(--bind "$path"); done
exec unshare --mount --pid --fork --kill-child ${offline:+--net} --uts --ipc \
    "$0" "${options[@]}" "$root" "$place" "$@"
