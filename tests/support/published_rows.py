"""One row of each published data set, hand-written in its exact columns and types."""

from __future__ import annotations

import json
from typing import Any

Row = dict[str, Any]

FIX = """diff --git a/acme/core.py b/acme/core.py
index 1111111..2222222 100644
--- a/acme/core.py
+++ b/acme/core.py
@@ -1,2 +1,2 @@
 def double(x):
-    return x + 2
+    return x * 2
"""
BUG = """diff --git a/acme/core.py b/acme/core.py
index 2222222..1111111 100644
--- a/acme/core.py
+++ b/acme/core.py
@@ -1,2 +1,2 @@
 def double(x):
-    return x * 2
+    return x + 2
"""
TEST_PATCH = """diff --git a/tests/test_core.py b/tests/test_core.py
--- a/tests/test_core.py
+++ b/tests/test_core.py
@@ -1 +1 @@
-import acme
+import acme.core
"""
F2P, P2P = ["tests/test_core.py::test_three"], ["tests/test_core.py::test_two"]

_COMMON: Row = {
    "repo": "Acme/acme",
    "instance_id": "Acme__acme-7",
    "base_commit": "a" * 40,
    "patch": FIX,
    "test_patch": TEST_PATCH,
    "problem_statement": "double(3) is 5.",
    "hints_text": "",
    "created_at": "2024-01-02T03:04:05Z",
    "version": "1.2",
}

SWE_BENCH: Row = _COMMON | {
    "FAIL_TO_PASS": json.dumps(F2P),
    "PASS_TO_PASS": json.dumps(P2P),
    "environment_setup_commit": "b" * 40,
}
SWE_BENCH_VERIFIED: Row = SWE_BENCH | {"difficulty": "<15 min fix"}
SWE_GYM: Row = _COMMON | {"FAIL_TO_PASS": F2P, "PASS_TO_PASS": P2P}
SWE_REBENCH: Row = _COMMON | {
    "FAIL_TO_PASS": F2P,
    "FAIL_TO_FAIL": [],
    "PASS_TO_PASS": P2P,
    "PASS_TO_FAIL": [],
    "environment_setup_commit": "b" * 40,
    "meta": {
        "commit_name": "head_commit",
        "has_test_patch": True,
        "is_lite": True,
        "llm_score": {"difficulty_score": 1},
        "num_modified_files": 1,
    },
    "install_config": {
        "env_vars": None,
        "env_yml_path": None,
        "install": "pip install -e .[dev]",
        "log_parser": "parse_log_pytest",
        "no_use_env": None,
        "packages": "requirements.txt",
        "pip_packages": ["pytest"],
        "pre_install": None,
        "python": "3.9",
        "reqs_path": ["requirements.txt"],
        "test_cmd": "pytest --no-header -rA --tb=line --color=no -p no:cacheprovider",
    },
    "requirements": "pytest==8.3.4\n",
    "environment": "name: acme\n",
    "license_name": "MIT",
    "docker_image": "swerebench/sweb.eval.x86_64.acme_1776_acme-7",
    "image_name": None,
}
SWE_SMITH: Row = {
    "instance_id": "acme__acme.0a1b2c3d.func_basic__x1y2z3",
    "patch": BUG,
    "FAIL_TO_PASS": F2P,
    "PASS_TO_PASS": P2P,
    "image_name": "swesmith.x86_64.acme__acme.0a1b2c3d",
    "repo": "swesmith/acme__acme.0a1b2c3d",
    "problem_statement": "double(3) is 5.",
}
R2E_GYM: Row = {
    "repo_name": "acme",
    "docker_image": "namanjain12/acme_final:" + "c" * 40,
    "commit_hash": "c" * 40,
    "parsed_commit_content": json.dumps({"file_diffs": [], "old_commit_hash": "d" * 40, "new_commit_hash": "c" * 40}),
    "execution_result_content": json.dumps({"repo_name": "acme", "test_file_names": ["test_1.py"]}),
    "modified_files": ["acme/core.py"],
    "modified_entity_summaries": [
        {
            "ast_type_str": "FunctionDef",
            "end_lineno": 2,
            "file_name": "acme/core.py",
            "name": "double",
            "start_lineno": 1,
            "type": "function",
        }
    ],
    "relevant_files": ["acme/core.py"],
    "num_non_test_files": 1,
    "num_non_test_func_methods": 1,
    "num_non_test_lines": 2,
    "prompt": "Write an issue.",
    "problem_statement": "[ISSUE]\n**Title:** double(3) is 5\n[/ISSUE]",
    "expected_output_json": json.dumps(
        {"test_three": "PASSED", "TestOld.test_two": "PASSED", "\u001b[1mtest_broken\u001b[0m": "FAILED"}
    ),
}

PUBLISHED: dict[str, Row] = {
    "swe_bench": SWE_BENCH_VERIFIED,
    "swe_gym": SWE_GYM,
    "swe_rebench": SWE_REBENCH,
    "swe_smith": SWE_SMITH,
    "r2e_gym": R2E_GYM,
}
