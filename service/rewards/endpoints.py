"""What components get from the endpoints they name: fields at submission, access at each lease."""

from dataclasses import dataclass, field

from pydantic import ValidationError

from dar.errors import NotFoundError, Problem, SecretUnreadableError
from dar.protocol.reward_endpoints import merged
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.spec import JobSpec
from dar.protocol.worker import ComponentAccess
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.probe.callbacks import ProbeInbox
from dar.rewards.probe.client import ProbeTarget
from dar.settings import Settings
from service.http import errors
from service.installation import Installation
from service.secret_box import SecretBox
from service.store import project_secrets, reward_endpoints, reward_secrets
from service.store.database import Transaction
from service.store.reward_tables import RewardEndpointRow
from service.store.tables import JobRow

COMPONENTS = "method.dar.rewards.components"


@dataclass(frozen=True, slots=True)
class ResolvedSpec:
    """A spec whose components have the fields of their endpoints."""

    spec: JobSpec
    endpoints: dict[str, RewardEndpointRow] = field(default_factory=dict)
    """By component name."""

    @property
    def links(self) -> dict[str, str]:
        """Endpoint ids by component name."""
        return {name: endpoint.id for name, endpoint in self.endpoints.items()}


def resolve(transaction: Transaction, project_id: str, spec: JobSpec) -> ResolvedSpec:
    """Fill in the fields that components leave out from the endpoints that they name.

    The endpoints are kept from being changed until the transaction ends.

    Raises:
        InvalidRequestError: The project has no such endpoint (``endpoint_not_found``), or its
            fields do not fit.
    """
    rewards = spec.dar.rewards
    if rewards is None or all(component.endpoint is None for component in rewards.components):
        return ResolvedSpec(spec)
    problems: list[Problem] = []
    endpoints: dict[str, RewardEndpointRow] = {}
    components: list[RewardComponent] = []
    for index, component in enumerate(rewards.components):
        path = f"{COMPONENTS}[{index}]"
        if component.endpoint is not None:
            try:
                endpoint = reward_endpoints.get(
                    transaction, project_id, component.endpoint, lock="keep"
                )
                component = _with_fields_of(endpoint, component)  # noqa: PLW2901 - the same component, with more fields
                endpoints[component.name] = endpoint
            except NotFoundError as error:
                problems.append(Problem(error.message, f"{path}.endpoint", "endpoint_not_found"))
            except ValidationError as error:
                found = error.errors(include_url=False, include_input=False)
                problems += [_below(path, problem) for problem in errors.problems_of(found)]
        components.append(component)
    if problems:
        raise errors.invalid(problems)
    complete = rewards.model_copy(update={"components": components})
    dar = spec.method.dar.model_copy(update={"rewards": complete})
    method = spec.method.model_copy(update={"dar": dar})
    return ResolvedSpec(spec.model_copy(update={"method": method}), endpoints)


def _below(path: str, problem: Problem) -> Problem:
    param = path if problem.param is None else f"{path}.{problem.param}"
    return Problem(problem.message, param, problem.code)


def _with_fields_of(endpoint: RewardEndpointRow, component: RewardComponent) -> RewardComponent:
    return merged(component, {"protocol": endpoint.protocol, **endpoint.options})


def component_of(endpoint: RewardEndpointRow) -> RewardComponent:
    """A component that stands for the endpoint alone."""
    options = {"protocol": endpoint.protocol, **endpoint.options}
    return RewardComponent.model_validate({"name": "endpoint", "url": endpoint.url, **options})


def access_to(
    transaction: Transaction, box: SecretBox, endpoint: RewardEndpointRow
) -> ComponentAccess:
    """URL and secrets of an endpoint.

    Raises:
        SecretUnreadableError: A secret cannot be decrypted, or the endpoint was deleted.
    """
    if endpoint.deleted_at is not None:
        raise SecretUnreadableError(
            f"reward endpoint {endpoint.id} was deleted; submit the job again with another one",
            code="endpoint_not_found",
        )
    found = reward_secrets.open_all(transaction, box, endpoint)
    return ComponentAccess(
        url=endpoint.url,
        secrets=found.secrets,
        headers=found.headers,
        endpoint_id=endpoint.id,
        revision=endpoint.revision,
        is_deterministic=reward_endpoints.is_deterministic(endpoint),
    )


def access_of(
    transaction: Transaction, installation: Installation, job: JobRow
) -> dict[str, ComponentAccess]:
    """URL and secrets of a job's reward services by component; only for the lease of an attempt.

    Raises:
        SecretUnreadableError: A secret cannot be decrypted, or an endpoint was deleted.
    """
    registered = reward_endpoints.of_job(transaction, job.id)
    found = {
        name: access_to(transaction, installation.secrets, endpoint)
        for name, endpoint in registered.items()
    }
    rewards = job.parsed_spec.dar.rewards
    for component in [] if rewards is None else rewards.components:
        if component.kind == "http" and component.url is not None:
            access = inline_access(transaction, installation, job.project_id, component.url)
            found.setdefault(component.name, access)
    return found


def inline_access(
    transaction: Transaction, installation: Installation, project_id: str, url: str
) -> ComponentAccess:
    """Access to a service that a component of a project's job names by its URL.

    Raises:
        SecretUnreadableError: The project's secret cannot be decrypted.
    """
    configured = installation.reward_secrets
    found = project_secrets.secrets_of(transaction, installation.secrets, configured, project_id)
    return ComponentAccess(url=url, secrets=found.values, headers={})


def probe_target(
    settings: Settings,
    component: RewardComponent,
    access: ComponentAccess,
    inbox: ProbeInbox | None = None,
) -> ProbeTarget:
    """The service of a component, for the service's own requests."""
    guard = EgressPolicy.from_settings(settings)
    return ProbeTarget(component, access.url, access.secrets, access.headers, guard, inbox)


def access_for(
    installation: Installation, job: JobRow, component: RewardComponent
) -> ComponentAccess | None:
    """Access for the service's own checks; None: no reward service, or unreadable secrets."""
    if component.kind != "http":
        return None
    with installation.database.read() as transaction:
        try:
            if component.url is not None:
                return inline_access(transaction, installation, job.project_id, component.url)
            endpoint = reward_endpoints.of_job(transaction, job.id).get(component.name)
            return (
                None if endpoint is None else access_to(transaction, installation.secrets, endpoint)
            )
        except SecretUnreadableError:
            return None
