#!/bin/busybox sh
# The lab guest's first process: devices, modules, the ext4 part; then the witness takes its place.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
while read -r module; do $b insmod "/modules/$module"; done </modules/order
exec /witness
