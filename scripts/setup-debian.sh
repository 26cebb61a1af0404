#!/bin/sh
# Installs the Debian or Ubuntu packages that the tests, the demo and the benchmarks use: where root, and only what is
# missing. Otherwise it says in one line what is left out and ends well: the tests say what they could not do without it.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

leave_out() {
    say "LEFT OUT: $1."
    exit 0
}

command -v apt-get >/dev/null 2>&1 ||
    leave_out "the Debian packages (qemu, a Linux kernel, iperf3 and so on): there is no apt-get here"

architecture=$(dpkg --print-architecture)
case $architecture in
    amd64) qemu="qemu-system-x86 ipxe-qemu" ;;
    arm64) qemu="qemu-system-arm ipxe-qemu" ;;
    *) qemu="" ;;
esac

# The guest:                             its user land and the tools that make its initramfs; its kernel is below
# Namespaces, traffic and measurements:  iproute2 iputils-ping ethtool iperf3 procps, gcc for the benchmarks' relay
# A guest that forwards to its own:      nftables, whose service Debian leaves switched off
# Other implementations, to test and measure against: passt slirp4netns vde2 dnsmasq isc-dhcp-client tshark
# A server for the guest, and its client on the host: dropbear-bin (the program without a service) openssh-client
packages="$qemu busybox-static kmod cpio iproute2 iputils-ping ethtool iperf3 procps gcc libc6-dev nftables iptables
    passt slirp4netns vde2 dnsmasq-base isc-dhcp-client tshark dropbear-bin openssh-client"

# Daemons that would take the machine's own network over when installed are unpacked into .cache, and run in namespaces
# only. Their libraries that a small machine may lack are unpacked with them.
resolved="systemd-resolved"
networkmanager="network-manager libnm0 libndp0 libjansson4 libpsl5"
packages="$packages dbus-daemon"

# The host's proxies of the tests: unpacked, too, since they would start with the machine, with what this one lacks. What uses them: curl wget
proxies="squid tinyproxy-bin microsocks"
# And the desktop's settings: libglib2.0-bin (gsettings)
packages="$packages curl wget libglib2.0-bin"

# Nameservers, to test and measure against: unpacked with all that they need and this machine has not got.
daemons="avahi-daemon unbound knot"
# What asks them; and musl, whose resolver is another one than glibc's: dnsperf knot-dnsutils musl-tools
packages="$packages dnsperf knot-dnsutils musl-tools"

# shellcheck disable=SC1091
. /etc/os-release
case " $ID ${ID_LIKE:-} " in
    *" ubuntu "*) kernel=linux-image-virtual ;;
    *) kernel=linux-image-cloud-$architecture ;;
esac

log=.cache/setup-debian.log
gave_up=.cache/setup-debian.left-out # what the last attempt could not install

find_missing() { # sets $missing; one call of dpkg-query, because this runs before each `make test`
    # shellcheck disable=SC2086
    installed=" $(dpkg-query -W -f='${db:Status-Status} ${Package}\n' $packages "$kernel" 2>/dev/null |
        sed -n 's/^installed //p' | tr '\n' ' ')"
    missing=
    for package in $packages $kernel; do
        case $installed in *" $package "*) continue ;; esac
        [ "$package" = "$kernel" ] && [ -d .cache/kernel ] && continue
        missing="$missing $package"
    done
    [ -d .cache/resolved ] || [ -x /usr/lib/systemd/systemd-resolved ] || [ -x /lib/systemd/systemd-resolved ] ||
        missing="$missing $resolved"
    [ -d .cache/networkmanager ] || [ -x /usr/sbin/NetworkManager ] || missing="$missing $networkmanager"
    [ -d .cache/proxies ] || missing="$missing $proxies"
    [ -d .cache/daemons ] ||
        { [ -x /usr/sbin/avahi-daemon ] && [ -x /usr/sbin/unbound ] && [ -x /usr/sbin/knotd ]; } ||
        missing="$missing $daemons"
    missing=${missing# }
}

unpack() { # the packages into .cache/$1
    folder=$1
    shift
    fresh=$PWD/.cache/$folder.new
    rm -rf "$fresh"
    mkdir -p "$fresh"
    (cd "$fresh" && apt-get download -qq -o APT::Sandbox::User=root "$@") || return 1
    for file in "$fresh"/*.deb; do dpkg-deb -x "$file" "$fresh" || return 1; done
    rm -f "$fresh"/*.deb
    rm -rf ".cache/$folder"
    mv "$fresh" ".cache/$folder"
}

unpack_with_libraries() { # the packages into .cache/$1, and with them what apt would install besides
    folder=$1
    shift
    fresh=$PWD/.cache/$folder.new
    rm -rf "$fresh"
    mkdir -p "$fresh/archives/partial"
    apt-get -yqq --no-install-recommends --download-only -o Dir::Cache::archives="$fresh/archives" \
        -o APT::Sandbox::User=root install "$@" </dev/null || return 1
    for file in "$fresh"/archives/*.deb; do
        # There is none where all are installed already.
        [ -e "$file" ] || continue
        dpkg-deb -x "$file" "$fresh" || return 1
    done
    rm -rf "$fresh/archives" ".cache/$folder"
    mv "$fresh" ".cache/$folder"
}

# A kernel package on a machine that boots by itself would add its kernel to the boot menu, perhaps as the first choice.
# There it is unpacked beside the sources instead; a container, or a machine booted from outside, has no boot loader and
# may have the package.
boots_by_itself() {
    [ -d /boot/grub ] || [ -d /boot/loader ] || [ -d /boot/efi/EFI ] || [ -d /boot/firmware ] ||
        command -v update-grub >/dev/null 2>&1
}

dependency() { # the package with a version in its name on which the one named $1 depends
    apt-cache depends "$1" | sed -n "s/^ *Depends: \\($2-[0-9].*\\)\$/\\1/p" | head -n 1
}

unpack_kernel() {
    # The named package is empty: it depends on the image of the day, and Ubuntu's image on its modules.
    image=$(dependency "$kernel" linux-image)
    [ -n "$image" ] || return 1
    modules=$(dependency "$image" linux-modules)
    fresh=$PWD/.cache/kernel.new
    rm -rf "$fresh"
    mkdir -p "$fresh"
    # shellcheck disable=SC2086
    (cd "$fresh" && apt-get download -qq -o APT::Sandbox::User=root "$image" $modules) || return 1
    for file in "$fresh"/*.deb; do dpkg-deb -x "$file" "$fresh" || return 1; done
    rm -f "$fresh"/*.deb
    [ -d "$fresh/lib/modules" ] || ln -s usr/lib "$fresh/lib" # since Debian 13
    for version in "$fresh"/lib/modules/*; do depmod -b "$fresh" "${version##*/}" || return 1; done
    rm -rf .cache/kernel
    mv "$fresh" .cache/kernel
}

available() { # those of the arguments that apt can install
    for package in "$@"; do
        # Not grep -q: it would leave apt-cache writing into a closed pipe.
        if apt-cache policy "$package" 2>/dev/null | grep 'Candidate: [^(]' >/dev/null; then printf '%s ' "$package"; fi
    done
}

apt() { apt-get -yqq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 --no-install-recommends "$@" </dev/null >>"$log" 2>&1; }

install_missing() {
    # What cannot be unpacked, because it has another name in this distribution, does not keep the rest away.
    # shellcheck disable=SC2086
    case " $missing " in *" $resolved "*) unpack resolved $resolved >>"$log" 2>&1 || : ;; esac
    # shellcheck disable=SC2086
    case " $missing " in *" $networkmanager "*) unpack networkmanager $networkmanager >>"$log" 2>&1 || : ;; esac
    # shellcheck disable=SC2086
    case " $missing " in *" $proxies "*) unpack_with_libraries proxies $proxies >>"$log" 2>&1 || : ;; esac
    # shellcheck disable=SC2086
    case " $missing " in *" $daemons "*) unpack_with_libraries daemons $daemons >>"$log" 2>&1 || : ;; esac
    unpacked=" $resolved $networkmanager $proxies $daemons "
    wanted=
    for package in $missing; do
        case $unpacked in *" $package "*) ;; *) wanted="$wanted $package" ;; esac
    done
    # shellcheck disable=SC2086
    wanted=$(available $wanted)
    wanted=${wanted% }
    case " $wanted " in *" $kernel "*)
        if boots_by_itself; then
            say "unpacking $kernel into .cache/kernel (installed, it would change what this machine boots)"
            apt install kmod && unpack_kernel >>"$log" 2>&1 || return 1
            wanted=$(printf ' %s ' "$wanted" | sed "s/ $kernel / /")
        fi ;;
    esac
    # shellcheck disable=SC2086
    install_quietly $wanted
}

policy=/usr/sbin/policy-rc.d # invoke-rc.d(8): 101 forbids packages to start what they install

install_quietly() {
    if [ ! -e $policy ]; then
        trap 'rm -f $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    apt install "$@"
}

find_missing
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] || leave_out "$missing: not installed, and only root can: sudo scripts/setup-debian.sh"
# A day's rest after a failure, so that a machine without a network or with an older distribution does not try each time.
if [ "$(cat "$gave_up" 2>/dev/null)" = "$missing" ] && [ -z "$(find "$gave_up" -mtime +0)" ]; then
    leave_out "$missing: could not be installed lately, see $log; to try again: rm $gave_up"
fi

say "installing $missing"
mkdir -p .cache
: >"$log"
# INITRD=No spares the half minute of building an initramfs that nobody boots (the kernel package's hook reads it).
export DEBIAN_FRONTEND=noninteractive INITRD=No
# The package lists are fetched when they are missing, or so old that they name files which are gone.
# shellcheck disable=SC2086
if [ "$(available $missing)" != "$missing " ] || ! install_missing; then
    apt update || say "apt-get update failed: $(grep '^E:' "$log" | tail -n 1)"
    install_missing || say "apt-get install failed: $(grep '^E:' "$log" | tail -n 1)"
fi
find_missing
[ -n "$missing" ] || { rm -f "$gave_up"; exit 0; }
printf '%s' "$missing" >"$gave_up"
leave_out "$missing: apt-get could not install them, see $log"
