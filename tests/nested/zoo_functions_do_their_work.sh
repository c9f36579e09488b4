# topology: zoo
# limit: 700
# Functions of 22 kinds, virtual functions among them, do their work in guests: what disks read has the right checksum, network functions carry
# packets to L1 and a page from it, the sound card plays, edu copies and interrupts, and pci-serial sends by ports.
. /causeway/files/lib.sh
. /causeway/files/zoo-lib.sh

zoo_guests
! grep -v ' yes$' causeway.results || fail "that is not what they should print"
echo "$(grep -c ' yes$' causeway.results) kinds of functions do their work"
! dmesg | grep -A3 'nobody cared' || fail "the host turned a line off"
