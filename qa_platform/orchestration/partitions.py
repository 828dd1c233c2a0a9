"""The partitions of the assets: one per uploaded file, in the order in which they were added. A batch is a contiguous range."""

import dagster as dg

PARTITIONS = "question_files"
question_files = dg.DynamicPartitionsDefinition(name=PARTITIONS)

RANGE_START_TAG = "dagster/asset_partition_range_start"
RANGE_END_TAG = "dagster/asset_partition_range_end"
BATCH_TAG = "qa/batch"
# Dagster's tag with the key of the request that a run comes from. The key owns the batch's claims until the run takes them over.
RUN_KEY_TAG = "dagster/run_key"

# Steps that answer files in Pachyderm take a slot in this pool. `dagster.yaml` sets the number of slots.
POOL = "pachyderm"
