"""Lists of jobs over HTTP and in the SDK: filters, and pages that start after or before a job."""

from collections.abc import Callable
from typing import Any

from dar.client import Client
from fakes.live_service import Live

PATH = "/v1/fine_tuning/jobs"


def test_filters_must_all_match_and_the_sdk_has_them_too(live: Live, sdk: Client) -> None:
    (live.settings.home / "models" / "other").mkdir()
    (live.settings.home / "models" / "other" / "config.json").write_text("{}")
    plain = live.submit(metadata={"team": "red"}, suffix="nightly")
    other = live.submit(model="other", metadata={"team": "blue=1"})
    made = plain["created_at"]
    for wanted, expected in (
        ({"model": "other"}, [other]),
        ({"label": "team"}, [other, plain]),
        ({"label": "team=blue=1"}, [other]),
        ({"label": "team=blue=1", "model": "base"}, []),
        ({"q": "NIGHTLY"}, [plain]),
        ({"q": other["id"]}, [other]),
        ({"created_after": made, "order": "asc"}, [plain, other]),
        ({"created_after": made + 3600}, []),
        ({"created_before": made}, []),
    ):
        listed = live.http.get(PATH, params=wanted).json()
        assert [job["id"] for job in listed["data"]] == [job["id"] for job in expected], wanted
        assert [job.id for job in sdk.jobs.list(**wanted)] == [job["id"] for job in expected]


def test_pages_go_in_both_orders_and_back(live: Live) -> None:
    made = [live.submit()["id"] for _ in range(4)]
    for order, expected in (("asc", made), ("desc", made[::-1])):
        seen: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = live.http.get(PATH, params={"limit": 3, "order": order, **after}).json()
            ids = [job["id"] for job in page["data"]]
            assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
            seen += ids
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert seen == expected
        back = live.http.get(PATH, params={"limit": 3, "order": order, "before": seen[-1]}).json()
        assert [job["id"] for job in back["data"]] == expected[:3]


def test_a_list_refuses_what_it_cannot_mean(live: Live, error_of: Callable[..., Any]) -> None:
    for query, param in (
        ("label==x", "label"),
        ("label=a&metadata[a]=b", "label"),
        ("created_after=-1", "created_after"),
        ("created_after=yesterday", "created_after"),
        ("created_before=999999999999", "created_before"),
        ("q=", "q"),
        ("limit=101", "limit"),
        ("limit=0", "limit"),
        ("after=ftjob-none", "after"),
        ("before=ftjob-none", "before"),
        ("order=newest", "order"),
        ("models=base", "models"),
    ):
        answer = live.http.get(f"{PATH}?{query}")
        assert (answer.status_code, error_of(answer)["param"]) == (400, param), query
