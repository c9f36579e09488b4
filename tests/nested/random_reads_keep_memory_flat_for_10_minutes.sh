# long
# limit: 2400
# random_reads_keep_memory_flat in full.
ROUNDS=20
SECONDS_EACH=30
. /causeway/files/random_reads_keep_memory_flat.sh
