import sys, tempfile, os
from pathlib import Path
from pydantic import SecretStr
from qa_platform.settings import PostgresSettings
from qa_platform.loading import migrate
from qa_platform.loading.load import load_file
from qa_platform.database import connect
from qa_platform import bookkeeping as b
from qa_platform.contract import *
from qa_platform_tests.loading_helpers import *
def test_smoke(database, tmp_path):
    s=PostgresSettings(host=database.host,port=database.port,user=database.user,dbname=database.dbname)
    migrate.upgrade(s); migrate.upgrade(s)
    up=AnsweredUpload([*answered_rows(5), AnsweredRow("q","c d",error="no_answer"), AnsweredRow("","x",error="empty_question")], rejections={7:Rejection(7,8,RowReason.EMPTY_QUESTION,"question","d","raw")})
    f=up.write(tmp_path/"a")
    with connect(s) as c:
        print(load_file(c,f,job_id="j"))
        print(load_file(c,f,job_id="j"))
        v=FileVersion("history.csv",1,1000,"AAAAAA==")
        print(b.records(c,[v]), b.check_file(c,v))
        print(b.latest_answered(c,["history.csv"],model=BUNDLED), b.latest_answered(c,["history.csv"],model=ANSWERED_BY))
        b.archived(c,v,place="processed/x")
        print(b.request_retry(c,"history.csv").status, b.waiting_elsewhere(c))
        print(load_file(c,f).status, load_file(c, up.again(load_id=2).write(tmp_path/"b")))
        w=FileVersion("history.csv",2,3,"x")
        print(b.claim(c,[w, FileVersion("o",1)],owner="A",lease_seconds=60), b.claim(c,[w],owner="B",lease_seconds=60), b.claimed(c))
        print([r.claim_owner for r in b.take_over(c,[w],token="A",owner="R",lease_seconds=60)], b.renew(c,"R",60))
        b.start(c,"R",[w],run_id="R",batch_id="bb"); print(b.batch_is_claimed(c,"bb"), b.batch_is_claimed(c,"b"))
        b.record_commit(c,[w],commit="c",job="c")
        print(b.charge(c,w,error="e",max_attempts=2),b.charge(c,w,error="e",max_attempts=2), b.claimed(c))
        b.release(c,"A"); b.requeue(c,w); b.mark_unchanged(c,FileVersion("history.csv",3)); b.reject_file(c,FileVersion("z",1),reason="r",detail="d"); b.mark_superseded(c,FileVersion("zz",1))
        for r in b.history(c,limit=10): print(r.version,r.status,r.rows,r.error)
        print(b.names_with_status(c,[FileStatus.FAILED]), b.newest_by_partition(c,["history.csv"]), b.pending_archive(c,limit=3))
    migrate.downgrade(s,"base"); migrate.upgrade(s)
