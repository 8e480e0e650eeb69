#!/bin/busybox sh
# Beside the witness: the ext4 part with a file chain's directory, the power button, the guest agent.
b=/bin/busybox
for part in 1 2 3 4 5 6 7 8 9; do
    [ -b /dev/vda3 ] && break
    $b sleep 0.1
done
$b mount -t ext4 /dev/vda3 /data
$b mkdir -p /run /var/run /tmp
$b acpid -f -c /etc/acpi -e /dev/input/event0 >/dev/null 2>&1 &
[ -x /usr/sbin/qemu-ga ] || exit 0
for port in /sys/class/virtio-ports/*; do
    [ "$($b cat "$port/name")" = org.qemu.guest_agent.0 ] || continue
    exec /usr/sbin/qemu-ga --method virtio-serial --path "/dev/${port##*/}" --statedir /run --logfile /run/qemu-ga.log
done
