# What an assigned NVMe wrote, as `causeway ctl dirty` tells it, against the trace: on type1, page by page, all that was mapped for writing
# between the start and the read, also what was unmapped before it, and nothing else.
# limit: 240
. /causeway/files/lib.sh

bind-vfio "$NVME" || fail "binding"
guest dirty <<'GUEST'
number=0
while true; do
    number=$((number + 1))
    blkread /dev/nvme0n1 direct 65536 16 --sha256 >/dev/null || fail "reading the disk"
    echo "reading $number"
done
GUEST

more_readings() { [ "$(grep -c '^reading' dirty.log)" -ge "$1" ]; }

# ask VERB...: the reply, in the file reply.
ask() { causeway ctl control "$@" >reply || fail "ctl $*: status $?"; }

# pages_of: the pages of lines `first last` in hexadecimal, one a line, sorted.
pages_of() {
    while read -r first last; do
        page=$((first / 4096))
        while [ $page -le $((last / 4096)) ]; do
            echo $page
            page=$((page + 1))
        done
    done | sort -u
}

# told: the pages in the file reply.
told() {
    grep -q '"next":null' reply || fail "there is more than one reply"
    sed 's/.*"ranges":\[\(.*\)\],"next".*/\1/; s/\],\[/\n/g; s/[][]//g' reply | sed '/^$/d' |
        while IFS=, read -r gpa len; do echo "$gpa $((gpa + len - 1))"; done | pages_of
}

# writable: lines of the trace on stdin, the guest-physical addresses of mappings that can be written.
writable() {
    grep -E ' (host extent|host map) .*perm=(rw|w)( |$)' | grep -vE 'result=[^o]' |
        sed -n 's/.*iova=\(0x[0-9a-f]*\)-\(0x[0-9a-f]*\) gpa=\(0x[0-9a-f]*\).*/\1 \2 \3/p' |
        while read -r first last gpa; do echo "$((gpa)) $((gpa + last - first))"; done | pages_of
}

# ledger N: the lines of the nth ledger of the trace.
ledger() { awk -v wanted="$1" '/ host ledger / { n++ } / host extent / && n == wanted' dirty.trace; }

watch() {
    trap '[ $? = 0 ] || causeway ctl control quit' EXIT
    wait_until 60 more_readings 2 || fail "the guest does not read"
    causeway ctl control dirty read --device vfio0 >reply
    expect "the status of a read before the start" $? 1
    causeway ctl control dirty start --device nobody >reply
    expect "the status of a start for nobody" $? 1
    causeway ctl control dirty >reply
    expect "the status of dirty without an action" $? 2

    ask pause
    ask trace
    ask dirty start
    expect "the reply to the start" "$(cat reply)" '{"devices":[{"id":"vfio0","known":"whole-mappings"}]}'
    ask resume
    before=$(grep -c '^reading' dirty.log)
    wait_until 60 more_readings $((before + 2)) || fail "the guest does not read on"
    ask pause
    ask dirty read --device vfio0
    expect_line reply '"known":"whole-mappings"'
    told >told.1
    expect "the number of pages" "$(field reply pages)" "$(wc -l <told.1)"
    ask trace
    { ledger 1; awk '/ host dirty-start / { on = 1 } / host dirty-read / { on = 0 } on && / host map /' dirty.trace; } | writable >granted.1
    cmp told.1 granted.1 || { diff granted.1 told.1 | head; fail "dirty is not what was mapped for writing"; }
    awk '/ host dirty-start / { on = 1 } / host dirty-read / { on = 0 } on && / host unmap .*0xffffffffffffffff/' dirty.trace >whole
    [ ! -s whole ] || fail "everything was unmapped at once"

    # Paused, with nothing read since: what is mapped now, and no more.
    ask dirty read --device vfio0
    told >told.2
    ledger 2 | writable >granted.2
    cmp told.2 granted.2 || { diff granted.2 told.2 | head; fail "a second read is not what is mapped"; }
    [ "$(wc -l <told.2)" -lt "$(wc -l <told.1)" ] || fail "nothing was unmapped between the reads"

    # The unit's own writes come with those of all devices, and a bitmap has as many bits.
    ask dirty read --out bitmap
    set=$(hexdump -v -e '1/1 "%02x"' bitmap | sed 's/[0]//g; s/[1248]/x/g; s/[3569ac]/xx/g; s/[7bde]/xxx/g; s/f/xxxx/g' | wc -c)
    expect "bits in the bitmap" "$set" "$(field reply pages)"
    ask dirty stop
    causeway ctl control dirty read >reply
    expect "the status of a read after the stop" $? 1
    ask audit
    expect_line reply '"differences":\[\]'
    ask quit
    echo "watched to the end"
}

watch >watching 2>&1 &
watching=$!
start dirty intel_iommu=on --device vfio,host="$NVME" --socket control --trace dirty.trace
expect "the code of a run that is ended by quit" "$STATUS" 0
wait $watching || { cat watching; fail "watching the guest"; }
cat watching
echo "$(wc -l <told.1) pages were mapped for writing, $(wc -l <told.2) of them at the end"
