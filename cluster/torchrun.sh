#!/bin/bash
# A run without a scheduler: on one machine, or the same line on each of several.
#   cluster/torchrun.sh pretrain trainer=ddp data=folder data.root=/data/images name=base
#   MACHINES=2 FIRST=node1 cluster/torchrun.sh pretrain experiment=simmim_swinv2_g data.root=/data/images name=giant
# MACHINES: how many. FIRST: one of them, which all can reach. PORT: free there. GPUS: of each machine.
command=$1
shift

machines=${MACHINES:-1}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

exec torchrun --nnodes "$machines" --nproc-per-node "$gpus" \
  --rdzv-backend c10d --rdzv-endpoint "${FIRST:-localhost}:${PORT:-29500}" \
  -m "simmim.$command" "$@" "trainer.devices=$gpus" "trainer.num_nodes=$machines" resume=auto
