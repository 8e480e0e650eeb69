#!/bin/busybox sh
# The lab guest's first process: devices, modules, the ext4 part; then the witness takes its place.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
while read -r module; do $b insmod "/modules/$module"; done </modules/order
if ! [ -b /dev/vda ]; then # virtio-scsi: the same disks under other names
    while read -r module; do $b insmod "/modules/$module"; done </modules/scsi
    for turn in 1 2 3 4 5 6 7 8 9; do
        [ -b /dev/vda ] && break
        [ -b /dev/sda ] && [ -b /dev/sdb ] && break
        $b sleep 0.2
    done
    for disk in /sys/block/sd*; do
        unit=$($b readlink "$disk/device") # …/0:0:0:UNIT; which of them becomes sda is a matter of chance
        case "${unit##*:}" in 0) letter=a ;; 1) letter=b ;; *) continue ;; esac
        for part in "" 1 2 3 4; do # parts may come a moment later
            $b ln -s "${disk##*/}$part" "/dev/vd$letter$part"
        done
    done
fi
exec /witness
