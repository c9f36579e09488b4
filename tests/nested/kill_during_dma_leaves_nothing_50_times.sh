# long
# limit: 3600
# kill_during_dma_leaves_nothing in full.
ROUNDS=50
. /causeway/files/kill_during_dma_leaves_nothing.sh
