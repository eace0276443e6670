# What this cluster needs, in one place; read by every job before its ranks start.

# module load cuda/13.0
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    # where several networks are there
# GEMOE_SRUN=(--container-image=/images/gemoe.sqsh --container-mounts="$PWD")
: "${GEMOE_PYTHON:=$GEMOE_CHECKOUT/.venv/bin/python}"
: "${GEMOE_MAX_RESTARTS:=50}"
