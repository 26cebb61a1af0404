#!/bin/sh
# netstack's guest agent: tells the gateway which ports this guest listens at, so that the host gets them too.
#
#     wget -qO- http://192.168.5.2/agent | sh          or: curl -fsS http://192.168.5.2/agent | sh
#
# It runs until it is stopped, comes back when the gateway does, and changes nothing in this guest. It needs an awk and
# one of bash, nc, curl and wget; busybox has what it needs. It needs no root, which only lets it see DNAT rules too.
#
# How: the gateway says "scan" some times a second. A single awk then reads the tables of sockets in /proc/net, in which
# the kernel lists those that listen first, so that it need not read thousands of connections; it answers with the list
# when that has changed, and with one byte when it has not. No process is started for that.

gateway=@GATEWAY@
host=@HOST@
# A proxy would ask in our place, and from another address.
unset http_proxy HTTP_PROXY all_proxy ALL_PROXY

# shellcheck disable=SC2016 # the dollars below are those of awk
# What runs in awk. Modes: "raw" speaks HTTP itself, "body" leaves that to curl, "once" prints one list.
program='
# The sockets of one table: the local address and port of each that listens, as the kernel writes them.
function read_table(name, protocol,    line, field) {
    while ((getline line < ("/proc/net/" name)) > 0) {
        split(line, field, " ")
        if (field[2] == "local_address") continue
        if (protocol == "udp") {
            # 07: not connected.
            if (field[4] == "07" && field[3] ~ /:0000$/) found = found name " " field[2] "\n"
        } else if (field[4] == "0A") {
            found = found name " " field[2] "\n"
        } else if (field[4] != "03") {
            # Behind those that listen come all others, which may be many. (03 stands among them in old kernels.)
            break
        }
    }
    close("/proc/net/" name)
}

# The names of the network devices: containers come and go with theirs, and with rules.
function read_devices(    line, names) {
    while ((getline line < "/proc/net/dev") > 0) {
        sub(/:.*/, "", line)
        names = names line
    }
    close("/proc/net/dev")
    return names
}

# Ports that rules hand on to other addresses (destination NAT), as containers publish theirs.
function read_rules(    line) {
    rules = ""
    if (has_iptables) {
        while (("iptables-save -t nat 2>/dev/null" | getline line) > 0)
            if (line ~ /-j DNAT/ || line ~ /^-A KUBE-NODEPORTS /) rules = rules "iptables " line "\n"
        close("iptables-save -t nat 2>/dev/null")
    }
    if (has_ip6tables) {
        while (("ip6tables-save -t nat 2>/dev/null" | getline line) > 0)
            if (line ~ /-j DNAT/) rules = rules "ip6tables " line "\n"
        close("ip6tables-save -t nat 2>/dev/null")
    }
    if (has_nft) {
        while (("nft -n list ruleset 2>/dev/null" | getline line) > 0)
            if (line ~ /dport.* dnat /) {
                gsub(/counter packets [0-9]+ bytes [0-9]+ /, "", line)
                rules = rules "nft " line "\n"
            }
        close("nft -n list ruleset 2>/dev/null")
    }
}

# How many sockets there are. The kernel keeps that in numbers, while for its tables it looks into every slot, of which a
# machine with much memory has half a million.
function count_sockets(    name, line, field, counts) {
    for (name in sockstat) {
        while ((getline line < name) > 0) {
            split(line, field, " ")
            if (field[1] ~ /^(TCP|UDP)6?:$/) counts = counts field[1] field[3] " "
        }
        close(name)
    }
    return counts
}

# The tables, each second time at the latest: one socket may have ended as another one began.
function scan_tables(    counts) {
    counts = count_sockets()
    if (counts != "" && counts == counts_before && !skipped) { skipped = 1; return }
    skipped = 0
    counts_before = counts
    found = ""
    read_table("tcp", "tcp")
    read_table("tcp6", "tcp")
    read_table("udp", "udp")
    read_table("udp6", "udp")
}

# The rules are read when something hints at a change, and for some rounds after it, and else now and then: that takes
# a process or two.
function scan(    devices, before) {
    before = found
    scan_tables()
    if (has_iptables || has_ip6tables || has_nft) {
        devices = read_devices()
        if (devices != devices_before) { rounds = 12; devices_before = devices }
        else if (found != before && rounds < 4) rounds = 4
        if (rounds > 0 || --idle_rounds < 0) {
            if (rounds > 0) rounds--
            idle_rounds = 19
            read_rules()
        }
    }
}

function report() {
    if (found rules == reported && said) { printf "=\n" }
    else { reported = found rules; said = 1; printf "%s%s.\n", found, rules }
    fflush()
}

BEGIN {
    sockstat["/proc/net/sockstat"]
    sockstat["/proc/net/sockstat6"]
    if (mode == "once") { scan(); printf "%s\n%s%s.\n", hello, found, rules; exit }
    if (mode == "raw") {
        printf "POST /agent/stream HTTP/1.0\r\nHost: %s\r\nContent-Type: text/plain\r\n", host
        printf "Content-Length: 9000000000000000\r\n\r\n"
    }
    printf "%s\n", hello
    fflush()
}
{ sub(/\r$/, "") }
$1 == "scan" { scans++; scan(); report() }
$1 == "relay" && $2 $3 ~ /^[0-9a-f.:]+$/ && $4 ~ /^[0-9]+$/ {
    system("sh -c \"$NETSTACK_RELAY\" relay " $2 " " $3 " " $4 " </dev/null >/dev/null 2>&1 &")
}
$1 == "stop" { sub(/^stop */, ""); print "netstack agent: " $0 > "/dev/stderr"; stopped = 1; exit }
END { if (mode != "once") exit stopped ? 4 : scans ? 0 : 3 }
'

have() { command -v "$1" >/dev/null 2>&1; }

# What joins a connection of the gateway to a socket of our loopback. Arguments: token, address, port.
# shellcheck disable=SC2016 # for the inner shell
relay_nc='
folder=$(mktemp -d) && mkfifo "$folder/back" || exit
{
    printf "POST /agent/relay?%s HTTP/1.0\r\n\r\n" "$1"
    exec nc "$2" "$3" <"$folder/back"
} | {
    exec 3>"$folder/back"
    rm -r "$folder"
    exec nc "$NETSTACK_GATEWAY" 80 >&3 3>&-
}'
# Bash cannot end one half of a connection, so the first end is the end of both. Its "wait -n" knows nothing of an end
# that came before it, hence the pauses.
# shellcheck disable=SC2016
relay_bash='exec bash -c '"'"'
exec 3<>"/dev/tcp/$1/$2" 4<>"/dev/tcp/$NETSTACK_GATEWAY/80" || exit
printf "POST /agent/relay?%s HTTP/1.0\r\n\r\n" "$0" >&4
cat <&3 >&4 &
there=$!
cat <&4 >&3 &
back=$!
pause=1
while kill -0 $there && kill -0 $back; do
    sleep $pause 3>&- 4>&- &
    wait -n
    pause=60
done
kill $(jobs -p)'"'"' "$@"'

# The variables of the program: what this guest is, and where rules could be.
prepare() {
    ports=$(tr '\t' ' ' 2>/dev/null </proc/sys/net/ipv4/ip_local_port_range) || ports=
    # The kernel writes addresses in the order of the machine's bytes, which its programs say in their sixth.
    order=$(dd if=/proc/self/exe bs=1 skip=5 count=1 2>/dev/null | tr '\001\002' 'lb')
    hello="hello 1 ${order:-l} ${ports:-32768 60999}"
    export NETSTACK_GATEWAY="$gateway" NETSTACK_RELAY=''
    if have nc; then NETSTACK_RELAY=$relay_nc; elif have bash; then NETSTACK_RELAY=$relay_bash; fi
    [ -z "$NETSTACK_RELAY" ] || hello="$hello relay"
    iptables=0 ip6tables=0 nft=0
    if [ "$(id -u)" = 0 ]; then
        uses_table iptables && iptables=1
        uses_table ip6tables && ip6tables=1
        have nft && nft=1
    fi
    # mawk reads whole blocks, and so would never see a line that waits for its answer, unless told otherwise.
    interactive=''
    if awk -W version 2>/dev/null </dev/null | grep -q mawk; then interactive='-W interactive'; fi
}

# The older iptables would make the table by looking at it, so it is only asked where there is one.
uses_table() {
    have "$1-save" || return 1
    case $("$1-save" -V 2>/dev/null) in
    *nf_tables*) return 0 ;;
    esac
    case $1 in
    iptables) grep -qs nat /proc/net/ip_tables_names ;;
    *) grep -qs nat /proc/net/ip6_tables_names ;;
    esac
}

scanner() {
    # shellcheck disable=SC2086 # some words or none
    exec awk $interactive -v "mode=$1" -v "hello=$hello" -v "host=$host" -v "has_iptables=$iptables" \
        -v "has_ip6tables=$ip6tables" -v "has_nft=$nft" "$program"
}

# A gateway that crashed says no more, and nothing tells us: awk sleeps for good. A look at whether it has slept without
# a break, now and then.
watch() {
    trap 'kill "$pause" 2>/dev/null; exit 0' TERM
    before=$(grep '^voluntary_ctxt' "/proc/$1/status" 2>/dev/null) || exit 0
    while :; do
        sleep "${NETSTACK_AGENT_PATIENCE:-10}" &
        pause=$!
        wait "$pause"
        now=$(grep '^voluntary_ctxt' "/proc/$1/status" 2>/dev/null) || exit 0
        [ "$now" != "$before" ] || break
        before=$now
    done
    kill "$@" 2>/dev/null
}

# Starts that for awk, whose number is the last one of $children, and waits for awk.
wait_watched() {
    awk=$!
    # shellcheck disable=SC2086 # some numbers
    watch "$awk" $children &
    children="$children $!"
    wait "$awk"
}

# Each way in turn: 0 after a talk that came to its end, 3 when none came about, 4 when the gateway wants no more.
# What is started is in $children, so that it ends with us.

talk_bash() {
    have bash || return 3
    # One process: the connection is awk's standard input and output.
    # shellcheck disable=SC2016,SC2086 # for the inner shell; some words or none
    bash -c '{ exec 3<>"/dev/tcp/$0/80"; } 2>/dev/null && exec "$@" <&3 >&3 3>&-' "$gateway" awk $interactive \
        -v mode=raw -v "hello=$hello" -v "host=$host" -v "has_iptables=$iptables" \
        -v "has_ip6tables=$ip6tables" -v "has_nft=$nft" "$program" &
    children=$!
    wait_watched
}

# Through two pipes with names, which are gone again as soon as both ends are open.
through_pipes() {
    mode=$1
    shift
    folder=$(mktemp -d 2>/dev/null) || folder=$(mktemp -d -p /run 2>/dev/null) || return 3
    mkfifo "$folder/words" "$folder/answers" || return 3
    "$@" <"$folder/answers" >"$folder/words" 2>/dev/null &
    children=$!
    {
        exec 3>"$folder/answers" 4<"$folder/words"
        rm -r "$folder"
        scanner "$mode" <&4 >&3 3>&- 4<&-
    } &
    children="$children $!"
    wait_watched
}

talk_nc() {
    have nc || return 3
    through_pipes raw nc "$gateway" 80
}

talk_curl() {
    have curl || return 3
    through_pipes body curl -sN -H 'Expect:' -H 'Content-Type: text/plain' -T . -X POST "http://$host/agent/stream"
}

# Without a way to hold a conversation: one request for each change, and now and then one to say that we are there.
talk_wget() {
    have wget || return 3
    last='' quiet=0 asked=0 patience=''
    if timeout 1 true 2>/dev/null; then patience='timeout 5'; fi
    while :; do
        list=$(scanner once) || return 3
        quiet=$((quiet + 1))
        if [ "$list" != "$last" ] || [ "$quiet" -ge 4 ]; then
            # shellcheck disable=SC2086 # two words or none
            $patience wget -q -O /dev/null --post-data="$list
" "http://$host/agent/ports" 2>/dev/null || break
            last=$list quiet=0 asked=1
        fi
        sleep 0.2 2>/dev/null || sleep 1
    done
    [ "$asked" = 1 ] || return 3
}

main() {
    have awk || { echo "netstack agent: there is no awk in this guest; install one, or busybox" >&2; exit 1; }
    ways=${NETSTACK_AGENT_WAYS:-bash nc curl wget}
    good='' children=''
    # shellcheck disable=SC2086 # some numbers or none
    trap 'trap - EXIT; kill $children 2>/dev/null; exit 143' INT TERM HUP
    while :; do
        prepare
        for way in ${good:-$ways}; do
            "talk_$way"
            status=$?
            # shellcheck disable=SC2086
            [ -z "$children" ] || kill $children 2>/dev/null
            children=''
            case $status in
            0) good=$way && break ;;
            4) exit 1 ;;
            *) good='' ;;
            esac
        done
        sleep 1
    done
}

# At the end, so that half a script does nothing.
main
