"""One partition per uploaded file. Order is the order of adding; a batch is a contiguous range of it, worked on in one pool."""

import dagster as dg

PARTITIONS = "question_files"
question_files = dg.DynamicPartitionsDefinition(name=PARTITIONS)

RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
BATCH_TAG = "qa/batch"

# Whatever answers files in Pachyderm takes a place in it. `dagster.yaml` says how many there are.
POOL = "pachyderm"
