"""An abandoned open commit is removed, even if the pipelines have been updated meanwhile."""

import grpc
from pachyderm_sdk.api import pfs, pps

from qa_platform.batches import commits
from qa_platform.contract import QUESTIONS_REPO
from qa_platform.settings import PachydermSettings
from qa_platform_tests.pachd_helpers import SUCCESS, UNRUNNABLE, Pachd, needs_workers, refused


@needs_workers
def test_an_open_commit_goes_even_if_a_pipeline_was_updated_meanwhile(clean_pachyderm: PachydermSettings) -> None:
    pachd = Pachd(clean_pachyderm.pachd_address)
    repo = pfs.Repo(name=QUESTIONS_REPO)
    pachd.client.pfs.create_repo(repo=repo)
    name = pachd.pipeline("p", "cp -r $source $pfs/out/", repo)
    for updated in (False, True):
        left = pachd.client.pfs.start_commit(branch=pachd.branch(repo), description="left open")
        if updated:
            pachd.create(pachd.spec(name, "true", repo), update=True)
            waiting = pachd.jobs(name)[0].job.id
            with refused(grpc.StatusCode.UNKNOWN, "subvenant"):
                pachd.client.pfs.drop_commit_set(commit_set=pfs.CommitSet(id=left.id))
        commits.drop_commit(pachd.client, left.id)
        assert commits.is_finishing(commits.head(pachd.client))
        after = pachd.put(repo, {"/a": b"%d" % updated})
        assert pachd.wait(name, after).state == SUCCESS
    assert pachd.wait(name, waiting).state == UNRUNNABLE
    assert pachd.client.pps.inspect_job(job=pachd.job(name, left.id)).state in (UNRUNNABLE, pps.JobState.JOB_KILLED)
    pachd.clean_up()
