"""Loads that servers of one's own report, in their own words."""

from __future__ import annotations

import pytest

from tidegate.upstream.server_load import ServerLoad, load_in

VLLM = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:cache_config_info{block_size="16",num_gpu_blocks="1000"} 1.0
"""


def test_vllms_engines_are_taken_together() -> None:
    load = load_in(VLLM)
    assert load == ServerLoad(5, 1, None, 16_000, 0.5)
    assert str(load) == "5 at work, 1 waiting, a KV cache of 16,000 tokens, 50% of it taken"


@pytest.mark.parametrize(
    "page", ["", "<html>not found</html>", '{"error": 1}', "vllm:num_requests_running{ 1"]
)
def test_what_is_no_page_of_metrics_says_nothing(page: str) -> None:
    assert not load_in(page).is_known


@pytest.mark.parametrize("odd", ["NaN", "-nan", "+Inf", "-1", "1e300", "soon", "", '3 4 5 # {a="'])
def test_an_odd_value_neither_raises_nor_hides_the_others(odd: str) -> None:
    names = ("running", "waiting")
    page = "".join(f'vllm:num_requests_{name}{{engine="1"}} {odd}\n' for name in names)
    page += f"vllm:kv_cache_usage_perc {odd}\nsglang:max_total_num_tokens {odd}\n"
    assert not load_in(page).is_known
    assert load_in(page + VLLM) == load_in(VLLM)


@pytest.mark.parametrize("blocks", ["None", "9" * 5_000, "9" * 12, "-3", "\N{SUPERSCRIPT TWO}"])
def test_a_kv_cache_of_no_possible_size_is_not_known(blocks: str) -> None:
    page = f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{blocks}"}} 1.0\n'
    assert load_in(page).kv_tokens is None


def test_sglang_and_tgi_have_names_of_their_own() -> None:
    sglang = (
        'sglang:num_running_reqs{model_name="m"} 8\nsglang:num_queue_reqs{model_name="m"} 4\n'
        'sglang:token_usage{model_name="m"} 0.52\nsglang:max_total_num_tokens{model_name="m"} 9e3\n'
    )
    assert load_in(sglang) == ServerLoad(8, 4, None, 9_000, 0.52)
    assert load_in("tgi_batch_current_size 2\ntgi_queue_size 7\n") == ServerLoad(2, 7)
