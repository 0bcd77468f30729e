"""What a training run will need of a cluster, before there is one: memory, arithmetic, traffic, time.

    ahawam plan --config=configs/robocoin.py --device=h100 --hosts=8        # config.mesh on 8 full hosts
    ahawam plan --config=configs/robocoin.py --mesh=1x64x1 --device=h100
    ahawam plan --config=... --mesh=1x64x1 --search      # which mesh, remat and microbatches are fastest
    ahawam plan --config=... --mesh=1x64x1 --compile     # and what the compiler says
    ahawam plan --config=... --policy --device=h200 --steps=1,2,10      # what chunk and refresh of its policy move

The real training step is traced, on shapes alone: nothing is allocated and no accelerator is needed; it takes seconds,
--search some more. --compile compiles the step for the absent devices, which takes
minutes and a plug-in. --policy is about inference on one GPU: it compiles what a policy runs, and counts what every
kernel reads and writes. Fields of the config may be changed as in ahawam train: --config.data.batch_size=256
--config.model.remat=dots.
"""

import sys

from absl import flags

from ahawam_jax.commands.flags import CONFIG, require, run_with_flags

_MESH = flags.DEFINE_string("mesh", None, "DATAxFSDPxTENSOR, as in 1x64x1; config.mesh by default.")
_DEVICE = flags.DEFINE_string("device", "h100", "h100, h200, a100, 5090d, v5p, v6e or v7x.")
_HOSTS = flags.DEFINE_integer("hosts", None, "Hosts that share the devices; by default as few as can.", lower_bound=1)
_NETWORK = flags.DEFINE_float("network", None, "GB/s that a device sends to other hosts, where it is not the usual.")
_SEARCH = flags.DEFINE_bool("search", False, "Rank meshes, remat and microbatches by expected time.")
_COMPILE = flags.DEFINE_bool("compile", False, "Compile the step for these devices, and compare.")
_POLICY = flags.DEFINE_bool("policy", False, "Instead: compile the policy for one GPU; bytes, launches, kernels.")
_STEPS = flags.DEFINE_list("steps", None, "Of --policy: numbers of Euler steps; config.policy.steps by default.")
_EPISODES = flags.DEFINE_integer("episodes", 1, "Of --policy: episodes at a time.", lower_bound=1)


def _plan(argv: list[str]) -> None:
    require(argv, CONFIG)
    import jax

    jax.config.update("jax_platforms", "cpu")  # a GPU that happens to be here is left alone
    from ahawam_jax.planning.compiling import compile_step
    from ahawam_jax.planning.devices import find_device, make_cluster
    from ahawam_jax.planning.estimate import estimate
    from ahawam_jax.planning.kernel_pages import layer_page
    from ahawam_jax.planning.page import beside, page, ranking
    from ahawam_jax.planning.search import search
    from ahawam_jax.planning.subject import default_mesh

    try:
        if _POLICY.value:
            print(_policy())
            return
        if _STEPS.value or _EPISODES.value > 1:
            raise ValueError("--steps and --episodes are about inference; give them with --policy.")
        if _SEARCH.value and _COMPILE.value:
            raise ValueError("--search compiles nothing; give --compile with the --mesh that it found.")
        network = None if _NETWORK.value is None else _NETWORK.value * 1e9
        mesh = _MESH.value
        if mesh is None:
            sizes = default_mesh(CONFIG.value, find_device(_DEVICE.value), _HOSTS.value or 1)
            mesh = "x".join(map(str, sizes))
        cluster = make_cluster(_DEVICE.value, mesh, _HOSTS.value, network)
        if _SEARCH.value:
            print(ranking(search(CONFIG.value, cluster), cluster))
            return
        one = estimate(CONFIG.value, cluster)
        print(page(one), flush=True)
        if _COMPILE.value:
            print(f"compiling the step for {cluster.devices} {cluster.device.name} ...", file=sys.stderr)
            compiled = compile_step(CONFIG.value, cluster)
            print(f"\n{beside(one, compiled)}")
            if compiled.kernels:
                print(f"\n{layer_page(compiled.kernels, one)}")
    except ValueError as error:
        sys.exit(f"error: {error}")


def _policy() -> str:
    from ahawam_jax.planning.devices import make_cluster
    from ahawam_jax.planning.kernel_pages import policy_page
    from ahawam_jax.planning.policies import compile_policy

    steps = _STEPS.value or [str(CONFIG.value.policy.steps)]
    if not all(count.isdecimal() and int(count) for count in steps):
        raise ValueError(f"--steps is {','.join(steps)}; expected positive numbers, as in 1,2,10.")
    if _MESH.value or _HOSTS.value or _NETWORK.value is not None or _SEARCH.value or _COMPILE.value:
        raise ValueError(
            "--policy is about one GPU and inference; --mesh, --hosts, --network, --search and --compile are about "
            "training."
        )
    cluster = make_cluster(_DEVICE.value, "1x1x1", None)
    programs = compile_policy(CONFIG.value, cluster, [int(count) for count in steps], _EPISODES.value)
    return policy_page(programs, cluster.device, _EPISODES.value)


def main(argv: list[str] | None = None) -> None:
    run_with_flags(_plan, argv)
