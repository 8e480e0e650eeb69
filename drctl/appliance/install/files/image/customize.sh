# What makes an appliance of a fresh Debian: `sh customize.sh ROOT STAGE VERSION UUID`, run by mmdebstrap when all
# packages are there. STAGE/wheels holds drctl's wheels, UUID is the root's. Nothing in it may differ from build to build.
set -eu
root=$1 stage=$2 version=$3 uuid=$4
own=/opt/drctl/versions/$version
mkdir -p "$root/opt/drctl/versions" "$root/tmp/wheels"
cp "$stage"/wheels/*.whl "$root/tmp/wheels/"
chroot "$root" python3 -I -m venv --without-pip "$own"
chroot "$root" sh -eu -c '
    pip=$(ls /tmp/wheels/pip-*.whl)
    mkdir /tmp/rest
    for each in /tmp/wheels/*.whl; do [ "$each" = "$pip" ] || mv "$each" /tmp/rest/; done
    "$0/bin/python" "$pip/pip" install --quiet --no-index --no-deps --no-cache-dir --no-compile \
        --root-user-action=ignore /tmp/rest/*.whl
    "$0/bin/python" -I -B -c "import drctl.appliance.daemon, drctl.replication.shipper, drctl.replication.receiver, drctl.cli.app"
' "$own"
echo "$version" > "$root$own/complete"
ln -s "$own" "$root/opt/drctl/current"
ln -s /opt/drctl/current/bin/drctl "$root/usr/local/bin/drctl"

# Compiled files by their sources' hashes: dates would differ. drctl's never change; Debian's may, at an upgrade.
find "$root/usr" "$root/opt" -name __pycache__ -type d -prune -exec rm -rf {} +
chroot "$root" env PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode checked-hash /usr/lib/python3 /usr/lib/python3.[0-9]* || true
chroot "$root" env PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode unchecked-hash "$own"

chroot "$root" systemctl --quiet enable drctl-seed drctl-tell systemd-networkd systemd-resolved systemd-timesyncd ssh
chroot "$root" systemctl --quiet mask serial-getty@ttyS0.service getty@tty1.service
chroot "$root" usermod --password '*' root
echo drctl-appliance > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 drctl-appliance\n::1 localhost\n' > "$root/etc/hosts"
ln -sf ../run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"

# GRUB's core lies between partition table and partition; a kernel that Debian upgrades is found by its link.
mkdir -p "$root/boot/grub"
cat > "$root/boot/grub/grub.cfg" <<END
set timeout=0
linux /vmlinuz root=UUID=$uuid ro console=tty0 console=ttyS0,115200 loglevel=4 systemd.show_status=false
initrd /initrd.img
boot
END
cat > "$root/tmp/early.cfg" <<END
search.fs_uuid $uuid root
set prefix=(\$root)/boot/grub
configfile /boot/grub/grub.cfg
END
chroot "$root" grub-mkimage -O i386-pc -o /tmp/core.img -c /tmp/early.cfg -p /boot/grub \
    biosdisk part_msdos ext2 search_fs_uuid configfile normal linux boot echo
cp "$root/tmp/core.img" "$root/usr/lib/grub/i386-pc/boot.img" "$stage/"
chroot "$root" dpkg --purge --force-depends grub-pc-bin >/dev/null
chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' > "$stage/packages"

# What is of this build alone.
rm -rf "$root"/tmp/* "$root"/var/log/* "$root"/var/cache/ldconfig "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old \
    "$root"/var/lib/dpkg/*-old "$root"/etc/*- "$root"/etc/ssh/ssh_host_* "$root"/var/lib/systemd/random-seed \
    "$root"/var/lib/dbus/machine-id "$root"/root/.ssh "$root"/var/lib/apt/lists/*
mkdir -p "$root/var/lib/apt/lists/partial"
: > "$root/etc/machine-id"
