# Looks at a host and changes nothing: one `key value` per line. Arguments: prefix, home, run, link's port.
prefix=$1 home=$2 run=$3 port=$4
say() { printf '%s %s\n' "$1" "$2"; }
# Not the login's own PATH: a Python below /root is of no use to the appliance's user.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
LC_ALL=C
export PATH LC_ALL
say os "$(. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME")"
say machine "$(uname -m)"
say uid "$(id -u)"
if [ "$(id -u)" = 0 ]; then say root yes; elif command -v sudo >/dev/null; then
    if told=$(sudo -n -- id -u 2>&1) && [ "$told" = 0 ]; then say root sudo; else say root "no $told"; fi
else say root "no there is no sudo"; fi
for python in python3 python3.11 python3.12 python3.13 python3.14; do
    place=$(command -v $python) && say python "$($python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) $place"
done
for program in libvirtd virtqemud virsh; do
    if command -v $program >/dev/null; then say libvirt "$($program --version 2>/dev/null | grep -o '[0-9][0-9.]*' | tail -n 1)" && break; fi
done
for program in qemu-system-$(uname -m) /usr/libexec/qemu-kvm qemu-kvm; do
    if command -v $program >/dev/null; then say qemu "$($program --version | grep -o '[0-9][0-9.]*' | head -n 1)" && break; fi
done
command -v qemu-img >/dev/null && say qemu_img yes
[ -d /run/systemd/system ] && say systemd "$(systemctl --version 2>/dev/null | awk 'NR == 1 {print $2}')"
for directory in "$prefix" "$home" "$run"; do
    above=$directory
    while [ ! -d "$above" ]; do above=$(dirname "$above"); done
    say space "$(df -Pk "$above" | awk 'NR == 2 {print $4}') $directory"
done
say listening "$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
    awk -v port="$(printf '%04X' "$port")" '$4 == "0A" && substr($2, length($2) - 3) == port {found = "yes"} END {print found}')"
say addresses "$(hostname -I 2>/dev/null || true)"
say current "$(readlink "$prefix/current" || true)"
say active "$(systemctl is-active drctl-appliance 2>/dev/null || true)"
for user in libvirt-qemu qemu; do
    if id $user >/dev/null 2>&1; then
        if id -Gn $user | grep -qw $user; then say qemu_group $user; else say qemu_group "$(id -gn $user)"; fi
        break
    fi
done
[ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ] && say labels apparmor
[ -e /sys/fs/selinux/enforce ] && say labels selinux
for service in firewalld ufw nftables; do
    [ "$(systemctl is-active $service 2>/dev/null)" = active ] && say firewall $service
done
say end yes
