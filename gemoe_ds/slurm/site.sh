# What this cluster needs, in one place; read by every job before its ranks start. Change it here or,
# where the package is installed, in a copy that GEMOE_SITE names.

# module load cuda/13.0
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0    # where several networks are there
# GEMOE_SRUN=(--container-image=/images/gemoe.sqsh --container-mounts="$PWD")
# GEMOE_PYTHON=python          # in the container; else the .venv of the checkout, or of `gemoe submit`
# GEMOE_MAX_RESTARTS=50
