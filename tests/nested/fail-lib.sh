# What the cases share in which a host call of a guest with an assigned NVMe fails. Sourced behind lib.sh.

# failing_guest MEGABYTES: the initrd of a guest that reads so much from its NVMe and says what came of it, and what it was told.
failing_guest() {
    bind-vfio "$NVME" || fail "binding"
    guest failing <<GUEST
if wait-for /dev/nvme0n1 10; then
    blkread /dev/nvme0n1 buffered 1048576 $1 --sha256 && echo "outcome right" || echo "outcome unread"
else
    echo "outcome no-disk"
fi
show_faults
dmesg | grep -E 'nvme' | sed 's/^/guest-nvme: /'
GUEST
    WANTED=
    RESULTS=0
}

# pinned: pages that are pinned on this host. Each processor counts for itself, and is made to say what it has.
pinned() {
    cat /proc/sys/vm/stat_refresh
    awk '/^nr_foll_pin_acquired / { acquired = $2 } /^nr_foll_pin_released / { released = $2 }
        END { if (acquired == "") exit 1; print acquired - released }' /proc/vmstat || fail "this kernel does not count pinned pages"
}

# one NUMBER OPTION...: runs the guest with that of fail-host-call. Sets STATUS, OUTCOME, CALL.
one() {
    number=$1
    shift
    rm -f failing.json
    # A disk that does not answer is given up after 5 s, on a quiet machine, in place of 30 and 60.
    patience=$((5 * ${BOOT_SCALE:-1}))
    fail-host-call "$@" -- causeway run --kernel "$KERNEL" --initrd failing.cpio --stats failing.json --timeout $((90 * ${BOOT_SCALE:-1})) \
        --cmdline "$GUEST_CMDLINE intel_iommu=on nvme_core.io_timeout=$patience nvme_core.admin_timeout=$patience nvme_core.multipath=N" \
        --device vfio,host="$NVME" </dev/null >failing.log 2>failing.err
    STATUS=$?
    OUTCOME=$(lines failing 'outcome ')
    CALL=$(sed -n 's/^fail-host-call: failed: //p' failing.err)
}

# calls NAME: how many of them the last run made.
calls() { sed -n 's/^fail-host-call: calls: //p' failing.err | tr ' ' '\n' | sed -n "s/^$1=//p" | grep . || echo 0; }

broken() {
    echo "--- the guest's end"
    tail -n 30 failing.log
    echo "--- messages"
    tail -n 30 failing.err
    fail "$*"
}

# judge WHAT [EXPECTED]: what a failure may come to, and nothing else:
#   went-on    the guest read right, and nothing was stopped
#   told       it did not: it has an I/O error or no disk, and its kernel says so; or other data, and a fault record
#   stopped    the function was stopped (its Bus Master stays off), and the guest was told
#   refused    the start was refused, with the reason: nothing ran
# Afterwards nothing is pinned and nothing is unbound; the audit finds no difference but that a function was stopped.
judge() {
    what=$1
    faults=
    [ "$CALL" != none ] || broken "$what: no such call was made"
    grep -q '^causeway: .*panicked' failing.err && broken "$what: a panic"
    case $STATUS in
    0)
        [ "$(lines failing 'guest: exit ')" = 0 ] || broken "$what: the guest's script did not end"
        stopped=$(field failing.json quarantined)
        refused=$(field failing.json unmaps_refused)
        # Of a function that was stopped the audit says so: the host may still hold what it did not let go of.
        differences=$(grep -o '"differences":\[[^]]*\]' failing.json)
        case $stopped-$differences in
        0-'"differences":[]' | 1-'"differences":["'*': it was stopped, '*) ;;
        *) broken "$what: $stopped functions stopped, $differences" ;;
        esac
        [ "$stopped" = "$((refused > 0))" ] || broken "$what: $refused refused unmaps, and $stopped functions stopped"
        case $OUTCOME-$stopped in
        right-0) verdict=went-on ;;
        *-0) verdict=told ;;
        *-1) verdict=stopped ;;
        esac
        faults=$(lines failing 'guest-fault: ' | grep -c .)
        if [ "$OUTCOME" = right ] && [ "$(lines failing 'sha256 ')" != "$WANTED" ]; then
            # A device does not notice that its write was blocked: writes on a PCI bus have no answer. The fault record is all that tells of it.
            [ "$faults" -gt 0 ] || broken "$what: not what is on the disk, and no fault in the guest's log"
            [ "$verdict" = stopped ] || verdict=told
        elif [ "$OUTCOME" = right ]; then
            :
        elif [ "$OUTCOME" = no-disk ]; then
            # Its driver was told by the device's silence, or by the error of its interrupts.
            [ -n "$(lines failing 'guest-nvme: ')" ] || broken "$what: no disk, and the kernel does not say why"
        else
            lines failing 'guest-nvme: ' | grep -qiE 'timeout|error|reset|abort' || broken "$what: not read, and the kernel does not say why"
        fi
        ;;
    4)
        verdict=refused
        grep -q '^causeway: error: ' failing.err || broken "$what: refused without a reason"
        [ -z "$OUTCOME" ] || broken "$what: refused, and the guest ran"
        ;;
    *) broken "$what: status $STATUS" ;;
    esac
    expect "$what: the driver of the NVMe" "$(basename "$(readlink "/sys/bus/pci/devices/$NVME/driver")")" vfio-pci
    expect "$what: pages pinned afterwards" "$(pinned)" "$PINNED"
    echo "result $number: $what: $verdict ($CALL; disk: ${OUTCOME:-not asked}, faults in the guest: ${faults:--}, \
refused maps: $([ ! -e failing.json ] || grep -oE '"refused_maps": *\{[^}]*\}' failing.json | grep -oE ':[0-9]+' | tr -d ':' | awk '{ sum += $1 } END { print sum + 0 }'))"
    RESULTS=$((RESULTS + $(echo "$CALL" | wc -w)))
    VERDICTS="${VERDICTS:-} $verdict"
    [ -z "${2:-}" ] || expect "$what: what it came to" "$verdict" "$2"
}

# without_failure: the run that the others are compared with. Sets PINNED, WANTED, MAPS, UNMAPS.
without_failure() {
    PINNED=$(pinned)
    one 0
    [ $STATUS = 0 ] && [ "$OUTCOME" = right ] || broken "without a failure: status $STATUS, '$OUTCOME'"
    WANTED=$(lines failing 'sha256 ')
    MAPS=$(calls map-dma)
    UNMAPS=$(calls unmap-dma)
    expect "the maps that were seen" "$MAPS" "$(field failing.json host_maps)"
    expect "the unmaps that were seen" "$UNMAPS" "$(field failing.json host_unmaps)"
    expect "pages pinned afterwards" "$(pinned)" "$PINNED"
    sed -n 's/^fail-host-call: //p' failing.err
    [ "$MAPS" -ge 40 ] && [ "$UNMAPS" -ge 40 ] || fail "only $MAPS maps and $UNMAPS unmaps"
    # A guest whose memory lies in larger pieces makes ten times fewer: what every guest makes is spread over.
    [ "$MAPS" -le 120 ] || MAPS=120
    [ "$UNMAPS" -le 70 ] || UNMAPS=70
}

# at PERCENT TOTAL: that far into so many calls, the first one at least. Several percentages, with commas between, are as many calls.
at() { echo "$1" | tr ',' '\n' | while read -r percent; do echo $((1 + ($2 - 1) * percent / 100)); done | paste -sd, -; }
