"""What a server counts and times, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
STEPS = (0, 8, 16, 24, 32, 48, 64, 96, 128)


class Metrics:
    """Of one server; safe to use from any thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        metric = {"registry": self._registry}
        self.clients = Gauge("ahawam_clients", "Connected clients", **metric)
        self.connections = Counter("ahawam_connections", "Connections, by how they began", ["outcome"], **metric)
        self.observations = Counter(
            "ahawam_observations", "Observations: answered, dropped for a newer one, refused, failed", ["outcome"],
            **metric,
        )  # fmt: skip
        self.stages = Histogram(
            "ahawam_stage_seconds",
            "wait: from arrival to its turn; decode: bytes to arrays; chunk: a policy call; refresh_and_chunk: one "
            "that planned first; total: from arrival to the answer's sending",
            ["stage"], buckets=SECONDS, **metric,
        )  # fmt: skip
        self.plan_age = Histogram(
            "ahawam_plan_age_steps", "Control steps between a plan's observation and the chunk's", buckets=STEPS,
            **metric,
        )  # fmt: skip
        self.plan_age_seconds = Histogram(
            "ahawam_plan_age_seconds", "The same on the clock, of a policy of two streams", buckets=SECONDS, **metric
        )
        self.failures = Counter("ahawam_planner_failures", "Refreshes beside chunks that failed", **metric)
        self.held = Counter("ahawam_held_chunks", "Chunks that repeat a command, for want of a young plan", **metric)
        self.refreshes = Counter("ahawam_refreshes", "Planner refreshes; rate() of it is the refresh rate", **metric)
        self.episodes = Counter("ahawam_episodes", "Episodes begun", **metric)
        self.watchers = Gauge("ahawam_watchers", "Connected watchers", **metric)
        self.frames = Counter("ahawam_frames", "Observations with their answers that watchers were shown", **metric)
        for outcome in ("answered", "dropped", "refused", "failed"):
            self.observations.labels(outcome)  # from zero on
        for outcome in ("accepted", "full", "unauthorised"):
            self.connections.labels(outcome)

    def page(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)
