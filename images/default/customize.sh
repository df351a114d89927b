# Runs as root inside the image once all packages are installed (sh -eu), before overlay/ is copied over it.

major=$(node --version | sed 's/^v\([0-9]*\).*/\1/')
if [ "$major" -lt 18 ]; then
    echo "instavm: the archive's nodejs is version $major; the default image needs 18 or newer" >&2
    exit 1
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "instavm: the default image needs Python 3.11 or newer")'

sed -i 's/^# *\(en_US.UTF-8 UTF-8\)/\1/' /etc/locale.gen
locale-gen
echo 'LANG=C.UTF-8' >/etc/default/locale

useradd --uid 1000 --create-home --shell /bin/bash appuser
echo 'appuser ALL=(ALL:ALL) NOPASSWD: ALL' >/etc/sudoers.d/appuser
chmod 0440 /etc/sudoers.d/appuser
install -d -o appuser -g appuser -m 0755 /app

# The first `import matplotlib.pyplot` looks at every font there is; do that here, once.
for user in root appuser; do
    su "$user" -s /bin/sh -c 'cd && MPLBACKEND=Agg python3 -c "import matplotlib.font_manager"'
done
