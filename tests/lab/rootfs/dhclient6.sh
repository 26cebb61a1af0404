#!/bin/sh
# What ISC's DHCPv6 client runs at each event: keeps what the server sent in /run/lease6 and sets the address.
# shellcheck disable=SC2154 # the variables come from dhclient
case "$reason" in
PREINIT6)
    ip link set "$interface" up
    ;;
BOUND6 | RENEW6 | REBIND6)
    env | sort >/run/lease6
    [ -n "$new_ip6_address" ] &&
        ip -6 addr replace "$new_ip6_address/${new_ip6_prefixlen:-128}" dev "$interface" \
            valid_lft "${new_max_life:-forever}" preferred_lft "${new_preferred_life:-forever}"
    if [ -n "$new_dhcp6_name_servers" ]; then
        : >/etc/resolv6.conf
        for server in $new_dhcp6_name_servers; do
            echo "nameserver $server" >>/etc/resolv6.conf
        done
    fi
    ;;
EXPIRE6 | STOP6 | RELEASE6)
    [ -n "$old_ip6_address" ] && ip -6 addr del "$old_ip6_address/${old_ip6_prefixlen:-128}" dev "$interface"
    ;;
esac
exit 0
