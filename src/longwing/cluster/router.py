"""`PrefixRouter`: Ray Serve asks it which replica a call should try first.

The wish comes with the call (`affinity.Preference`), so the router itself knows nothing. Ray asks
the replicas in our order whether they have room, and takes the first that has.
"""

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from longwing.cluster.affinity import Preference, ranked


class PrefixRouter(RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """Orders replicas by a call's `wish`; calls without one go to any."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the first to be tried first."""
        wish: Any = pending_request.kwargs.get("wish") if pending_request is not None else None
        if not isinstance(wish, Preference):
            return [candidate_replicas]
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in ranked(by_name, wish)]
