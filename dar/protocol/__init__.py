"""Everything that crosses a process: pydantic models, and the rules over specs and rows.

Models, one file per kind of object:

api_keys: API keys, and requests for new ones.
base: base classes and common types of all models.
checkpoints: checkpoints, their manifests and files.
events: events of a job.
file_uploads: training files that are sent in parts.
file_validation: what is in a training file.
files: uploaded files.
graders: graders in the shape of OpenAI.
health: responses of the health checks.
jobs: a job as the service returns it.
job_config: what a job is made of, and requests to copy or change one.
job_validation: the report of a dry run.
metrics: all metrics of a job by name, with unit and meaning.
models: models that a job may start from.
retention: what would be deleted by age and size.
reward_callbacks: responses to results that a reward service posts.
reward_endpoints: registered reward services.
reward_probe: the report of a probe.
reward_secret: the secret for requests to reward services that jobs name by URL.
reward_spec: the ``rewards`` of a job spec.
reward_stats: statistics of reward requests.
rewards: ``dar.reward.v1``, requests to a reward service and its responses.
samples: completions stored for viewing.
spec: the job spec.
status: statuses of jobs and attempts, and which are final.
stream: frames of the stream of a job.
worker: messages between workers and the service.
workers: workers as the service shows them, and orders to them.

Rules that several processes share:

hints: the thresholds of all hints.
budget_checks: what ``kl_budget`` cannot be combined with.
hub_data: the address of a data set on a hub.
hub_refusals: what it means that a hub does not give something, and what to do.
ids: identifiers.
model_configs: what a model's config.json says, without torch.
presets: named sets of hyperparameters.
row_files: the rows of a data set or of a JSON Lines file in order, with all their rules.
row_values: the columns that a row of any format may have.
rows: formats of the rows of a data set.
shared_start: the common beginning of two texts that may be a prompt.
spec_checks: checks of a spec that need no data.
target_patterns: patterns of LoRA target modules that need little time.
"""
