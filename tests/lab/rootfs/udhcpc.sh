#!/bin/sh
# What busybox's DHCP client runs at each event: keeps every option that the server sent in /run/lease, for the tests to
# read, and configures the interface as a distribution's script would.
# shellcheck disable=SC2154 # the variables come from udhcpc
case "$1" in
deconfig)
    ip -4 addr flush dev "$interface"
    ip link set "$interface" up
    ;;
bound | renew)
    env | sort >/run/lease
    [ -n "$mtu" ] && ip link set "$interface" mtu "$mtu"
    ip -4 addr flush dev "$interface"
    ip addr add "$ip/${mask:-24}" ${broadcast:+broadcast "$broadcast"} dev "$interface"
    for gateway in $router; do
        ip route replace default via "$gateway" dev "$interface"
    done
    : >/etc/resolv.conf
    [ -n "${search:-$domain}" ] && echo "search ${search:-$domain}" >>/etc/resolv.conf
    for server in $dns; do
        echo "nameserver $server" >>/etc/resolv.conf
    done
    ;;
nak)
    echo "NAK: $message" >>/run/nak
    ;;
esac
