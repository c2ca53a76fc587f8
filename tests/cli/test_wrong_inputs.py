"""Every wrong input is answered with one clear sentence, an exit code, and nothing lost; through the real command line."""

import base64
import contextlib
import hashlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lcx.cli.main import main
from tests.cli.command import CONFIG, lcx

CURATION = Path(__file__).parents[2] / "configs" / "data" / "long_mixture.py"
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"
"""Every stage of it sets its own learning rate."""

TINY = "from tests.cli import tiny\n\ndef get_config():\n    c = tiny.get_config()\n    {}\n    return c\n"
"""A config file that changes the tiny one."""

TALK = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'

LLAMA = (
    '{"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, '
    '"num_attention_heads": 4, "max_position_embeddings": 64}'
)

SYNTHESIS = """
from lcx.data.curation.config import curated, defaults

def get_config():
    return defaults({"synthesize": {"new": {"method": "task"}}}, code=curated("long", source={"kind": "stdlib", "limit_bytes": 1}))
"""

FILES = {
    "new.py": SYNTHESIS,
    "syntax.py": "def get_config(:\n",
    "empty.py": "x = 1\n",
    "broken.py": "def get_config():\n    return undefined_name\n",
    "nothing.py": "def get_config():\n    return None\n",
    "typo.py": TINY.format("c.optim.lrr = 1.0"),
    "moved.py": TINY.format("c.model.mlp_tile = 64"),
    "moved_argument.py": "from lcx.recipes.recipe import defaults\n\ndef get_config():\n    return defaults({}, remat='none')\n",
    "moved_sweep.py": "from tests.cli.tiny import get_config\n\ndef get_sweep():\n    return [{'model.remat': 'none'}]\n",
    "books.py": TINY.format("c.data.parts = {'books': c.data.parts.text}"),
    "type.py": TINY.format("c.optim.lr = 'fast'"),
    "numbers.py": "from tests.cli.tiny import get_config\n\ndef get_sweep():\n    return [1, 2]\n",
    "variant.py": "from lcx.recipes.recipe import variant_of\n\ndef get_config(variant=''):\n    variant_of(variant, 'smoke')\n",
    "sweep.py": "from tests.cli.tiny import get_config\n\ndef get_sweep():\n    return [{'optim.lrr': 1.0}]\n",
    "empty.txt": "",
    "zero.bin": "a\0b",
    "number.jsonl": '{"text": 5}\n',
    "list.jsonl": "[1, 2]\n",
    "page.jsonl": '{"txt": "one"}\n',
    "tokenizer.json": "{}",
    "damaged.model": "garbage",
    "few.tiktoken": "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)),
    "chats.jsonl": TALK * 2,
    "roles.jsonl": TALK + '{"messages": [{"rol": 1}]}\n',
    "own.jinja": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "escape.jinja": "{{ ''.__class__.__mro__ }}",
    "endless.jinja": "{% for i in range(10**9) %}x{% endfor %}",
    "enormous.jinja": "{{ 'x' * 10**10 }}",
    "prompts.jsonl": '{"prompt": "one"}\n{"promt": "two"}\n',
    "broken.jsonl": '{"prompt": \n',
    "none.jsonl": "\n",
    "lama/config.json": '{"model_type": "lama"}',
    "empty_llama/config.json": LLAMA,
    "pickled/config.json": LLAMA,
    "pickled/pytorch_model.bin": "",
    "quantised/config.json": LLAMA[:-1] + ', "quantization_config": {"bits": 4}}',
}

TRAIN = "train --config={config} --workdir={new} "
CHAT = TRAIN + "--config.data.parts.text.source.kind=chat --config.data.parts.text.source.path={tmp}/chats.jsonl "
RUN = "run --config={config} --workdir={new} "
GENERATE = "generate --checkpoint={run} "
PLAN = "plan --config={config} --nocompile "
TEMPLATE = CHAT + "--config.data.chat_template={tmp}/"

# What is typed -> what the answer has to name.
WRONG = {
    # the command line itself
    "tarin --config={config}": "no command 'tarin'; did you mean 'train'",
    "dta inspect": "no command 'dta'; did you mean 'data'",
    "data prepar": "no command 'prepar'; did you mean 'prepare'",
    "train --cofnig={config}": "unknown flag --cofnig for lcx train; did you mean '--config'?",
    "train --workdir={new}": "--config is missing; name a file",
    "train --config={config} --workdir": "missing value for flag --workdir",
    "train --config.seed=3 --config={config}": "--config.seed=3 comes before --config; name the config file first",
    "train --config.seed=3": "--config is missing; name a file",
    TRAIN + "again": "unexpected argument 'again'; set config values with --config.KEY=VALUE",
    "eval --checkpoint={run} --items=many": "invalid value --items=many: expected a non-negative integer, such as 20",
    "train --config={config} --workdir={new} --profile=fast": "--profile=fast is not a range of steps; give the first and the last",
    "train --config={config} --workdir={new} --profile=4:2": "--profile=4:2 holds no step; the first step is 1",
    "train --config={config} --workdir={new} --profile=0:2": "--profile=0:2 holds no step; the first step is 1",
    "train --config={config} --workdir={new} --profile=2:999": "--profile=2:999 goes beyond the last step of the run",
    "train --config={config} --workdir={run} --profile=1:2": "--profile=1:2 names steps that are done, for the run is at step",
    "train --host_devices=0 --config={config}": "invalid value --host_devices=0: expected a positive integer",
    "train --host_devices=100000 --config={config}": "--host_devices=100000 is too many; give at most 512",
    "train --host_devices 100000 --config={config}": "--host_devices=100000 is too many; give at most 512",
    "train --config={config} --workdir=": "--workdir= is empty; name a directory or omit the flag",
    # the config file
    "train --config={tmp}/missing.py": "missing.py does not exist or is not a file; name a config file such as",
    "train --config={tmp}/syntax.py": "syntax.py, line 1 (`def get_config(:`): SyntaxError: invalid syntax; fix the config file",
    "train --config={tmp}/empty.py": "empty.py has no get_config(); define one",
    "train --config={tmp}/variant.py:smok --workdir={new}": "the config's variant='smok' is unknown; did you mean 'smoke'",
    "train --config={tmp}/broken.py": "broken.py, line 2 (`return undefined_name`): NameError: name 'undefined_name' is not "
    "defined; fix the config file",
    "train --config={tmp}/nothing.py": "get_config() returned NoneType; it must return a ConfigDict",
    "train --config={tmp}/typo.py --workdir={new}": "config.optim has no field 'lrr'; did you mean 'lr'",
    "train --config={tmp}/type.py --workdir={new}": "config.optim.lr='fast': expected float, got str",
    # its values
    TRAIN + "--config.optim.lrr=1": "config.optim has no field 'lrr'; did you mean 'lr'",
    TRAIN + "--config.stages.base.stepz=1": "config.stages.base has no field 'stepz'; did you mean 'steps'",
    TRAIN + "--config.model.remat=none": "--config.model.remat has moved; set --config.execution.remat instead",
    "train --config={tmp}/moved.py --workdir={new}": "config.model.mlp_tile has moved; set config.execution.mlp_tile instead",
    "train --config={tmp}/moved_argument.py --workdir={new}": "config.model.remat has moved; set config.execution.remat instead",
    "sweep --config={tmp}/moved_sweep.py --workdir={new}": "model.remat has moved; set execution.remat instead",
    TRAIN + "--config.execution.remat=nune": "config.execution.remat='nune' is unknown; did you mean 'none'",
    TRAIN + "--config.execution.loss_tile=0": "execution.loss_tile=0 must be above 0",
    TRAIN + "--config.seed.x=1": "config.seed=0 is of type int and has no field 'x'",
    TRAIN + "--config.optim.lr=fast": "invalid value --config.optim.lr=fast: expected a number, such as 0.001",
    TRAIN + "--config.monitor.enabled=perhaps": "invalid value --config.monitor.enabled=perhaps: expected true or false",
    TRAIN + "--config.evals.needle_items=few": "invalid value --config.evals.needle_items=few: expected an integer, such as 20",
    TRAIN + "--config.stages.base.max_position=far": "invalid value --config.stages.base.max_position=far: expected an integer",
    TRAIN + "--config.stage_order=base,longer": "config.stage_order='base,longer' is a single name; give a list, as in",
    TRAIN + "--config.seed=-1": "config.seed=-1 must not be negative",
    TRAIN
    + "--config.stages.base.seq_len=99999999999": "stages.base: 99,999,999,999 positions exceed the number of int32 positions;",
    TRAIN + "--config.optim.lr=-1": "optim.lr=-1.0 must be above 0",
    "train --config={quickstart} --workdir={new} --config.optim.lr=-1": "optim.lr=-1.0 must be above 0",
    TRAIN + "--config.positions.default.theta=-500": "rope.theta=-500.0 must be a number above 1, such as 10000",
    TRAIN + "--config.positions.default.name=yarm": "positions.default.name='yarm' is unknown; did you mean 'yarn'",
    TRAIN + "--config.model.head_dim=7": "= 7 dims; choose an even number of at least 2, such as 6",
    TRAIN + "--config.model.num_kv_heads=3": "model.num_kv_heads=3 must divide num_heads=2; use one of [1, 2]",
    TRAIN + "--config.model.pattern=local": "has local layers; set model.window to a number of tokens",
    TRAIN + "--config.stages.base.accumulate=3": "stages.base.batch_size=8 must be divisible by accumulate=3; its divisors are",
    TRAIN + "--config.stages.base.batch_size=6": "stages.base.batch_size=6 must be divisible by 8 (data=1 x fsdp=8 x expert=1 x",
    TRAIN + "--config.mesh.context=8 --config.stages.base.seq_len=60": "seq_len=60 must be divisible by 8 (mesh axes",
    TRAIN + "--config.mesh.data=3": "need a multiple of 3 devices and 8 are available; lower their product, "
    "or take 3 devices, on a CPU with --host_devices=3, or in a local launch with --num_processes=3",
    TRAIN + "--config.mesh.data=16 --config.mesh.fsdp=1": "need 16 devices and 8 are available; set one axis to -1",
    TRAIN + "--config.model.vocab_size=100": "model.vocab_size=100 is below the 256 tokens of data.tokenizer='bytes'; set it to",
    TRAIN + "--config.init_from={tmp}/nowhere": "nowhere does not exist; name a run's workdir, one of its",
    # the data
    TRAIN + "--config.data.parts.text.source.kind=text --config.data.parts.text.source.path={tmp}/absent*": "matches no file; give",
    TRAIN + "--config.data.parts.text.source.kind=text --config.data.parts.text.source.path={tmp}/*.txt": "has no text; give files",
    TRAIN
    + "--config.data.parts.text.source.kind=array_record --config.data.parts.text.source.path={tmp}": "holds no prepared dataset",
    TRAIN + "--config.data.tokenizer={tmp}/no/tokenizer.json": "does not exist; give the path of a tokenizer.json, a SentencePiece",
    TRAIN + "--config.data.tokenizer={tmp}/tokenizer.json": "cannot be read as a tokenizer.json",
    TRAIN + "--config.data.tokenizer={tmp}/damaged.model": "is neither a SentencePiece model nor a file of tiktoken ranks",
    TRAIN + "--config.data.tokenizer={tmp}/few.tiktoken": "write them to few.tiktoken.json next to it, for example",
    CHAT: "tokenizer 'bytes' has no chat template; name a template file with data.chat_template",
    TEMPLATE + "nowhere.jinja": "nowhere.jinja cannot be read",
    TEMPLATE + "escape.jinja": "escape.jinja is rejected: it accesses '__class__' of a str, which templates must not use; fix it",
    TEMPLATE + "endless.jinja": "endless.jinja is rejected: range(1,000,000,000) has more than",
    TEMPLATE + "enormous.jinja": "enormous.jinja is rejected: it creates a value of more than",
    TEMPLATE
    + "own.jinja --config.data.parts.text.source.path={tmp}/roles.jsonl": "roles.jsonl:2: messages[0] has role=None; expected",
    TEMPLATE
    + "own.jinja --config.data.parts.text.source.path={tmp}/page.jsonl": "page.jsonl:1 has no messages under source.field=",
    "data prepare --kind=chat --path={tmp}/chats.jsonl --out={new}": "--kind='chat' is read directly, with its loss weights",
    "data prepare --path={tmp}/empty.txt --kind=text --out={new} --shard_tokens=0": "--shard_tokens=0 must be above 0",
    "data prepare --kind=text": "--out is missing; name the directory to write, such as --out=data/text",
    "data prepare --kind=texty --out={new}": "--kind='texty' is unknown; did you mean 'text'",
    "data prepare --kind=text --path={tmp}/empty.txt --out={new} --split=test": "--split=test means nothing to --kind='text', only",
    "data prepare --path={tmp}/empty.txt --out={new}": "is not read with --kind='stdlib', which is Python's own library; set",
    "data prepare --kind=text --path={tmp}/latin.prompt --out={tmp}/empty.txt": "empty.txt is a file; name a folder",
    TRAIN + "--config.data.parts.text.source.path={tmp}/*.txt": "is not read with source.kind=",
    "data prepare --kind=array_record --out={new}": "--kind=array_record is the format this command writes, not reads; allowed:",
    "data prepare --kind=jsonl --path={tmp}/page.jsonl --out={new}": "no text under --field='text'; did you mean 'txt'",
    "data prepare --kind=jsonl --path={tmp}/own.jinja --out={new}": "own.jinja:1 is not valid JSON (Expecting property name "
    "enclosed in double quotes at column 2); if it is plain text, set --kind='text', or --kind=text",
    "data prepare --kind=jsonl --path={tmp}/broken.jsonl --out={new}": "broken.jsonl:1 is not valid JSON (Expecting value at "
    "column 11); correct the line, or leave it out",
    "data prepare --kind=jsonl --path={tmp}/number.jsonl --out={new}": "has 5 under --field='text'; expected text",
    "data prepare --kind=jsonl --path={tmp}/list.jsonl --out={new}": "is not a JSON object; expected lines such as {'text': ...}",
    "data prepare --kind=text --path={tmp} --out={new}": "is a directory; add a pattern, such as",
    "data prepare --kind=text --path={tmp}/zero.bin --out={new}": "is not text (it contains zero bytes)",
    "data prepare --out={tmp}": "which is not part of an lcx dataset; use a new folder",
    "data prepare --kind=tfds --path=nosuch --out={new}": "tfds dataset 'nosuch' split 'train' cannot be opened",
    "data prepare --append_eos --out={new}": "end-of-sequence token, and tokenizer 'bytes' has none; use tokenizer 'bytes+eos'",
    "data curate --out={new}": "--config is missing",
    "data curate --config={curation}": "--out is missing; name the directory to write, such as --out=data/curated",
    "data curate --config={curation} --out={new} --workers=0": "--workers=0 must be at least 1",
    "data curate --config={curation} --out={new}": "source.path='books/**/*.txt' matches no file; give a path or a glob pattern",
    "data curate --config={curation} --config.sources.books.source.path={tmp}/empty.txt --out={new}": "empty.txt has no text; give",
    "data curate --config={curation} --out={tmp}": "which is not part of a curation; use a new folder",
    "data curate --config={curation} --out={tmp}/empty.txt": "empty.txt is a file; name a directory with --out",
    "data curate --config={curation} --config.decontaminate.path={tmp}/broken.jsonl --out={new}": "broken.jsonl cannot be read",
    "data curate --config={config} --out={new}": "tiny.py is the config of a run; name one of a curation, such as configs/data/",
    "data curate --config={tmp}/new.py --config.synthesize.new.method=rephrase --out={new}": "but config.generator names none",
    "data curate --config={tmp}/new.py --config.synthesize.new.method=rephrse --out={new}": "did you mean 'rephrase'",
    "data curate --config={tmp}/new.py --config.synthesize.new.task.kind=needle --out={new}": "task.kind='needle' is unknown",
    "data curate --config={tmp}/new.py --config.synthesize.new.rephrase.style=textbook --out={new}": "leave it out or set method=",
    "data curate --config={tmp}/new.py --config.synthesize.new.task.length=9999999 --out={new}": "use a larger corpus",
    "data inspect --config={config} --stage=lnger": "--stage='lnger' is unknown; did you mean 'longer'",
    "data inspect --config={config} --rows=0": "--rows=0 must be at least 1",
    "data inspect --config={config} --rows=1 --plot={tmp}/mixture.svg": "mixture.svg must end in .png and its directory must",
    "data inspect --config={config} --rows=1 --plot={new}/mixture.png": "must end in .png and its directory must exist, as in",
    "data inspect --config={config} --rows=1 --html={tmp}/mixture.png": "mixture.png must end in .html and its directory must",
    "data inspect --config={config} --rows=1 --html={new}/mixture.html": "must end in .html and its directory must exist, as in",
    # workdirs and checkpoints
    "train --config={config} --config.seed=1 --workdir={run}": "holds a run with another config: seed is 0 there but 1 here",
    "train --config={config} --config.stages.longer.steps=9 --workdir={run}": "stages.longer.steps is 2 there but 9 here",
    "train --config={config} --config.stages.longer.steps=9 --config.seed=1 --workdir={run}": "seed is 0 there but 1 here, and 1 "
    "other value differs, too; name another --workdir",
    "train --config={tmp}/books.py --workdir={run}": " is not set there but 'text' here, and ",
    "train --config={config} --workdir={tmp}/empty.txt": "empty.txt is a file; name a directory",
    "eval --lengths=64": "--checkpoint is missing; name a run's workdir",
    "eval --checkpoint={tmp}": "(config.json is missing); name a run's workdir, one of its checkpoints/<step>, a Hugging Face "
    "folder or a GGUF file",
    "generate --checkpoint={tmp} --prompt=a": "does not hold a run (config.json is missing); name a run's workdir, one of its",
    "chat --checkpoint={tmp}": "does not hold a run (config.json is missing); name a run's workdir, one of its checkpoints/<step>",
    "eval --checkpoint={tmp}/nowhere": "nowhere does not exist; name a run's workdir, one of its",
    "eval --checkpoint={run} --stage=lnger": "has no stage 'lnger'; its stages are base, longer",
    "eval --checkpoint={run} --step=3": "has no checkpoint of step 3; its steps are 2, 4",
    "eval --checkpoint={run} --lengths=64,long": "--lengths: 'long' is not a whole number of tokens, or one",
    "eval --checkpoint={run} --step=2 --stage=base": "--step=2 and --stage=base conflict; give only one of them",
    "eval --checkpoint={run}/checkpoints/2 --step=4": "/2 names step 2, which conflicts with step=4; give only one of them",
    "eval --checkpoint={run}/checkpoints/2 --stage=longer": "/2 names step 2, which conflicts with stage=longer; give only one of",
    "eval --checkpoint={run} --label= --lengths=64": "error: --label= is empty; name the result, or leave the flag out",
    "eval --checkpoint={run} --tasks= --lengths=64": "error: --tasks= is empty; name what to measure, such as --tasks=ruler, or",
    "eval --checkpoint={run} --tasks=ruler_niah": "error: --tasks='ruler_niah' is unknown; did you mean 'ruler_niah_single_1', 'ru",
    "eval --checkpoint={run} --tasks=ruler_qa_1 --lengths=2048": "ruler_qa_1 asks about documents, but --qa_1 names no file,",
    "eval --checkpoint={run} --tasks=long_perplexity --evaluator={new} --lengths=64": "error: --evaluator {tmp}/new does not exist",
    "eval {run}": "; did you mean --checkpoint=/",
    "eval --checkpoint={run} --lengths=4G": "--lengths: '4G' is not a whole number of tokens, or one with K or M",
    "eval --endpoint=http://localhost:9/v1 --model=m --tokenizer=bytes --api=txt": "--api=txt: expected tokens or text or chat",
    "eval --endpoint=http://localhost:9/v1 --model=m --tokenizer=bytes --lengths=64": "error: --tasks is missing; a server answers",
    "eval --checkpoint={run} --label=after": "--label=after is reserved for the evaluations of lcx run; choose another",
    "eval --checkpoint={run} --lengths=64 --positions=t5": "positions='t5' learns table, which the checkpoint does not have; try",
    "eval --checkpoint={run} --lengths=64 --positions=yarm": "error: --positions='yarm' is unknown; did you mean 'yarn'",
    "eval --checkpoint={run} --positions=yarn:factor": "--positions='yarn:factor': 'factor' is not key=value, as in",
    RUN + "\"--config.evals.zero_shot=('yarm',)\"": "error: evals.zero_shot='yarm' is unknown; did you mean 'yarn'",
    RUN + "\"--config.evals.tasks=('rular',)\"": "error: evals.tasks='rular' is unknown; did you mean 'ruler'",
    "eval --checkpoint={run} --lengths=64 --positions=yarn:factor=big": "factor='big'",
    "eval --checkpoint={run} --tasks=rular --lengths=64": "error: --tasks='rular' is unknown; did you mean 'ruler'",
    "eval --checkpoint={run} --tasks=ruler_niah_single_1 --lengths=64": "error: --lengths has 64, but ruler_niah",
    "eval --checkpoint={run} --tasks=ruler_vt --lengths=2048 --prompt_format=chat": "no chat template; name a template file with -",
    "eval --checkpoint={run} --tasks=ruler_qa_1 --lengths=2048 --qa_1={tmp}/no.json": "no.json' does not exist or is not a file",
    "eval --checkpoint={run} --tasks=needle_in_prose --lengths=2048 --prose={tmp}/no*.txt": "error: --prose='",
    "eval --checkpoint={run} --tasks=passkey --lengths=2048 --prose={tmp}/no*.txt": "is read by none of --tasks (passkey);",
    "eval --checkpoint={run} --tasks=longbench --lengths=2048": "longbench reads files; name their folder with --data: it looks",
    "eval --checkpoint={run} --tasks=longbench --lengths=2048 --data={tmp}/no": "is not a directory; it looks for",
    "eval --checkpoint={run} --api=text": "--api belongs to --endpoint, which is not given; add it or leave --api out",
    "eval --checkpoint={run} --items=0 --perplexity_tokens=0": "--items=0 and --perplexity_tokens=0 leave nothing to measure",
    "eval --checkpoint={run} --label=../x": "--label=../x cannot be a file's name; take one of letters, digits, and",
    "eval --checkpoint={run} --hang_timeout=-5": "--hang_timeout=-5 must be above 0 seconds",
    "eval --checkpoint={run} --model=m": "--model belongs to --endpoint, which is not given; add it or leave --model out",
    "eval --endpoint=http://localhost:9/v1 --tasks=ruler": "--model is missing; the endpoint's name of the model",
    "eval --endpoint=http://localhost:9/v1 --model=m --tasks=ruler": "--tokenizer is missing; the folder of",
    "eval --endpoint=localhost --model=m --tokenizer=bytes --tasks=ruler": "--endpoint='localhost' is not an address; give",
    "eval --endpoint=http://localhost:9/v1 --model=m --tokenizer=bytes --tasks=needles": "--tasks has 'needles', which no server",
    "eval --endpoint=http://localhost:9/v1 --checkpoint={run}": "--checkpoint and --endpoint conflict; give only one of them",
    "eval --endpoint=http://localhost:9/v1 --positions=yarn": "--positions=yarn needs a checkpoint; a server",
    "eval --endpoint=http://localhost:9/v1 --dtype=bfloat16": "--dtype=bfloat16 needs a checkpoint; a server has chosen its own",
    "eval --checkpoint={run} --dtype=float8": "dtype='float8' is unknown; did you mean 'float",
    "harness --checkpoint={run} --tasks=a --dtype=int8": "dtype='int8' is unknown",
    # generation
    "generate --prompt=a": "--checkpoint is missing; name a run's workdir",
    "generate --checkpoint={run}": "no prompt given; use --prompt=TEXT or --prompt_file=FILE",
    "generate --checkpoint={run} a": "unexpected argument 'a'; give prompts with --prompt=TEXT",
    "generate --checkpoint={tmp}/nowhere --prompt=a": "nowhere does not exist; name a run's workdir, one of",
    "generate --checkpoint={run} --prompt=a --stage=lnger": "has no stage 'lnger'; its stages are base, longer",
    GENERATE + "--prompt_file={tmp}/empty.txt": "empty.txt is empty; write a prompt into it",
    GENERATE + "--prompt=a --host_devices=2": "--host_devices=2 has no effect without a mesh; add --context=N or --tensor=N",
    GENERATE + "--prompt=": "prompt 1 is empty; write at least one character",
    GENERATE + "--prompt_file={tmp}/missing.txt": "missing.txt does not exist; name a text file, or a .jsonl",
    GENERATE + "--prompt_file={tmp}/latin.prompt": "latin.prompt is not UTF-8 text (byte 1 is 0xe9); convert it",
    GENERATE + "--prompt_file={tmp}/prompts.jsonl": "prompts.jsonl, line 2 has no text under 'prompt'; write lines such as",
    GENERATE + "--prompt_file={tmp}/broken.jsonl": "broken.jsonl, line 1 is not JSON (",
    GENERATE + "--prompt_file={tmp}/none.jsonl": "none.jsonl is empty; write a prompt into it",
    GENERATE + "--prompt=a --temperature=-1": "--temperature=-1.0 must be a number of at least 0",
    GENERATE + "--prompt=a --temperature=hot": "invalid value --temperature=hot: expected a number, such as 0.0",
    GENERATE + "--prompt=a --top_p=0": "--top_p=0.0 must be above 0 and at most 1",
    GENERATE + "--prompt=a --top_p=1.5": "--top_p=1.5 must be above 0 and at most 1",
    GENERATE + "--prompt=a --top_k=0": "top_k=0 must be at least 1",
    GENERATE + "--prompt=a --top_p=0.5": "--top_p=0.5 only applies to sampling; add --temperature=1 or omit it",
    GENERATE + "--prompt=a --seed=5": "--seed=5 only applies to sampling; add --temperature=1 or omit it",
    GENERATE + "--prompt=a\udcff": "contains bytes that are not valid UTF-8; pass UTF-8 text instead",
    GENERATE
    + "--prompt=a --max_new_tokens=3000000000": "max_new_tokens=3,000,000,000 exceeds the number of int32 positions; lower it",
    GENERATE + "--prompt=a --positions=rope --max_new_tokens=2000000000": "lower max_new_tokens, or give fewer prompts at a time",
    "export --checkpoint={run} --out=/proc/lcx": "/proc/lcx cannot be created",
    GENERATE + "--prompt=a --temperature=1 --seed=-1": "--seed=-1 must be from 0 to",
    GENERATE + "--prompt=a --max_new_tokens=0": "max_new_tokens=0 must be at least 1",
    GENERATE + "--prompt=a --max_new_tokens=8 --chunk=0": "chunk=0 must be at least 1",
    GENERATE + "--prompt=a --stop=": "a stop string is empty; omit it, or give text to stop at",
    GENERATE + "--prompt=a --positions=yarm": "error: --positions='yarm' is unknown; did you mean 'yarn'",
    GENERATE + "--prompt=a --context=3": "need a multiple of 3 devices and 8 are available",
    GENERATE + "--prompt=a --context=0": "invalid value --context=0: expected a positive integer",
    "report {run} again": "unexpected argument 'again' beside",
    "report {run} --workdir={tmp}": "a report is of one workdir",
    "report --workdir={tmp}/empty.txt": "empty.txt is a file; give the --workdir of a run",
    "theta --host_devices=2": "unknown flag --host_devices for lcx theta",
    "theta --to=5": "--to=5 must be at least 7 tokens",
    "theta --to=1X": "invalid value --to=1X: expected a whole number of tokens, or one with K or M, such as 1048576",
    "verify {run} --update": "is a run, of which --update accepts nothing",
    "compare {run}/config.json {run}/config.json": "config.json is not an evaluation of lcx; name one such as",
    "launch --backend=slurm --nodes=2 -- main": "lcx has no command 'main'; did you mean 'train'?",
    "launch --backend=slurm --nodes=2 -- data": "lcx data is a group of commands; name one of curate, prepare, inspect",
    "report": "--workdir is missing; name the workdir of a run",
    "report --workdir={tmp}": "has neither metrics.jsonl nor eval/*.json; train or evaluate there first",
    "plan --topology=v5p:2x2x2": "--config is missing; name a file",
    PLAN + "--topology=v5q:4x4": "--topology='v5q' is unknown; did you mean 'v5",
    PLAN + "--topology=v5p:4x4": "--topology=v5p:4x4 has 2 dimensions, but slices of v5p have 3; write it as in v5p:4x4x4",
    PLAN + "--topology=v5e:1x1 --slices=0": "--slices=0 must be at least 1",
    PLAN
    + "--topology=v5e:2x2 --config.mesh.fsdp=3": "mesh axes data=1, fsdp=3, expert=1, tensor=1, context=1 need 3 devices and 4",
    PLAN + "--topology=v5e:4x4": "stages.base.batch_size=8 must be divisible by 16",
    PLAN + "--stage=bse": "--stage='bse' is unknown; did you mean 'base'",
    PLAN + "--find=contxt": "--find='contxt' is unknown; did you mean 'context'",
    PLAN + "--what_if=execution.remat": "'execution.remat' is not key=value, as in execution.remat=offload,mesh.ulysses=4",
    PLAN + "--what_if=execution.remta=block": "--what_if=execution.remta: execution has no field 'remta'; did you mean 'remat'",
    PLAN + "--what_if=seed.x=1": "--what_if=seed.x: seed holds 0 and no fields; change it as a whole in the config",
    PLAN + "--find=remat --html={new}.html": "--html draws the plan of the config as it is, and --find looks for others; leave",
    PLAN + "--html={tmp}": "is a directory; name a file in it, such as",
    PLAN + "--what_if=execution.remat=blok": "config.execution.remat='blok' is unknown; did you mean 'block'",
    "sweep --config={config} --workdir={new}": "tiny.py has no get_sweep(); define it, or use a file in configs/sweeps",
    "sweep --config={tmp}/sweep.py --collect --workdir={new}": "does not exist, so there is nothing to collect; name the workdir",
    "sweep --config={tmp}/numbers.py --workdir={new}": "returned [1, 2]; make a list of points with lcx.recipes.sweeps",
    "sweep --config={tmp}/sweep.py --workdir={new}": "the sweep sets 'optim.lrr', which the config does not have; did you mean",
    # Hugging Face folders
    "import": "--source is missing; name a directory with config.json and safetensors files",
    "import --source={tmp}/none": "none does not exist; fetch a model first, for example with",
    "import --source={tmp}/empty.txt": "empty.txt is neither a directory nor a GGUF file; name the folder that it is in",
    "import --source={run} --workdir={new}": "is the config of a run of lcx, not of a Hugging Face model; `lcx export` writes",
    "import --source={tmp}": "has no config.json, so it is not a Hugging Face model",
    "import --source={tmp}/lama --workdir={new}": "'lama' is not an architecture that lcx supports; did you mean 'llama'",
    "import --source={tmp}/empty_llama --workdir={new}": "has no model.safetensors and no model.safetensors.index.json",
    "import --source={tmp}/pickled --workdir={new}": "pytorch_model.bin is a pickle, which can run arbitrary code when loaded",
    "import --source={tmp}/quantised --workdir={new}": "quantization_config={'bits': 4} is not supported; use the original",
    "import --source={tmp}/empty_llama --dtype=int8 --workdir={new}": "has no model.safetensors",
    "import {tmp}/lama": "unexpected argument '",
    "harness --checkpoint={run}": "--tasks is missing; name tasks of lm_eval",
    "harness --tasks=niah_single_1": "--checkpoint is missing; name a run's workdir, a Hugging Face folder or a GGUF file",
    "harness --checkpoint={run} --tasks=a --include={new}": "is not a folder; name one with YAML files of tasks",
    "harness --checkpoint={run} --tasks=a --lengths=64,long": "--lengths: 'long' is not a whole number of tokens",
    "harness --checkpoint={run} --tasks=a --lengths=64 --length=32": "--length=32 must be at least 64, the longest of --lengths",
    "harness --checkpoint={run} --tasks=a --positions=yarm": "error: --positions='yarm' is unknown; did you mean 'yarn'",
    "harness --checkpoint={run} --tasks=a --prompt_format=chat": "has no chat template",
    "eval --checkpoint={run} --tasks=needles --evaluator={run}": "has nothing to judge: only long_perplexity has key tokens",
    "eval --checkpoint={tmp}/pickled": "pytorch_model.bin is a pickle",
    "export": "--checkpoint is missing; name a run's workdir",
    "export --checkpoint={run}": "--out is missing; name a new directory",
    "export --checkpoint={run} --out={tmp}": "already exists; choose a new folder, or delete it first",
    "export --checkpoint={run} --out={new} --dtype=int8": "dtype='int8' is unknown",
    "export --checkpoint={run} --out={new} --stage=base --step=2": "--step=2 and --stage=base conflict; give only one of them",
    "export --checkpoint={tmp} --out={new}": "does not hold a run (config.json is missing)",
    "report --workdir={run} --add={tmp}/none*.json": "none*.json matches no file; name evaluations such as",
    "report --workdir={run} --add={tmp}/page.jsonl": "page.jsonl is not an evaluation of lcx; name one such as",
    "compare": "takes a run's workdir or two evaluations but got 0; use lcx compare ONE.json OTHER.json",
    "compare {tmp}/lama": "has not been evaluated before and after; `lcx run` does that at its end",
    "compare {new}": "new does not exist; name a run's workdir, or two evaluations, as in lcx compare ONE.json OTHER.json",
    "compare {tmp}/page.jsonl": "page.jsonl is a single file; name a run's workdir, or two evaluations, as in lcx compare",
    "compare {new}/4.json {tmp}/page.jsonl": "4.json does not exist; `lcx run` writes eval/before.json and eval/after.json",
    "compare {tmp}/lama {tmp}/lama/4.json": "lama is not a file; name an evaluation, such as",
    "compare {tmp}/lama/4.json {tmp}/page.jsonl": "4.json does not exist; {tmp}/lama has config.json",
    "compare {tmp}/page.jsonl {tmp}/page.jsonl": "page.jsonl is not an evaluation of lcx; name one such as",
    "compare {run} --up_to=1": "--up_to",
    "verify": "lcx verify takes one folder or GGUF file but got 0",
    "verify {tmp}/none": "none does not exist; name a run, an exported model, a dataset",
    "verify {tmp}/empty_llama": "nothing could be checked",
    "verify {run}/checkpoints/77": "does not exist",
    "verify {run} --updat": "unknown flag --updat for lcx verify; did you mean",
    "diff {run}": "lcx diff takes two models but got 1; use lcx diff ONE OTHER",
    "diff {run} {tmp}/lama": "model_type='lama' is not an architecture",
    "train --config={config} --workdir={new} --config.init_from={tmp}/pickled": "pytorch_model.bin is a pickle",
    # doremi
    "doremi --config={config} --workdir={new} --stage=nope": "stage 'nope' is not in the config; its stages are base, longer",
    "doremi --config={config} --workdir={new} --step_size=-1": "doremi.step_size=-1.0 must be above 0",
    "doremi --config={config} --workdir={new} --smoothing=2": "doremi.smoothing=2.0 must be at least 0 and below 1",
    "doremi --config={config} --workdir={new}": "stage base trains on text alone; DoReMi weighs two parts or more",
    # theta
    "theta --from=-1": "--from=-1 must be at least 7 tokens",
    "theta --theta=-500": "theta=-500.0 must be a number above 1",
    "theta --head-dim=127": "head_dim=127 must be even",
    "theta --head-dim=2000000": "head_dim=2000000 must be even, at least 2 and at most 4,096",
    "theta --theta=1e300": "at most 1e+30",
    "theta --to=99999999999999999999": "at most 2,147,483,647",
    "theta --factor=1.0000001": "needs more than 64 stages to 1,048,576; set it above 1.08",
}


@pytest.fixture
def places(tmp_path, run):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.prompt").write_bytes("café"[2:].encode("latin-1"))
    return {"config": CONFIG, "curation": CURATION, "quickstart": QUICKSTART, "tmp": tmp_path, "run": run, "new": tmp_path / "new"}


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def one_sentence(err: str, says: str) -> None:
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert says in lines[0], err
    assert "Traceback" not in err


@pytest.mark.parametrize("typed", WRONG)
def test_one_sentence_and_nothing_lost(typed, places, capsys):
    before = contents(places["run"])
    with pytest.raises(SystemExit) as left:
        main(shlex.split(typed.format(**places)))
    one_sentence(capsys.readouterr().err, WRONG[typed].replace("{tmp}", str(places["tmp"])))
    assert left.value.code == 1
    assert contents(places["run"]) == before
    # Nothing was begun that would stand in the way of the command put right.
    assert not (places["new"] / "config.json").exists() and not list(places["new"].rglob("*.array_record*"))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("train --config={config} --workdir={copy}", "no checkpoint in"),
        ("eval --checkpoint={copy} --lengths=64", "is damaged: array"),
    ],
)
def test_all_checkpoints_corrupt(command, says, places, capsys):
    copy = places["tmp"] / "copy"
    shutil.copytree(places["run"], copy)
    for path in (copy / "checkpoints").rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = contents(copy)
    with pytest.raises(SystemExit) as left:
        main(shlex.split(command.format(copy=copy, **places)))
    one_sentence(capsys.readouterr().err, says)
    assert left.value.code == 1
    assert contents(copy) == before


@pytest.mark.parametrize("damage", ["{", "[]", '{"model": {}}'])
def test_a_damaged_config_of_a_workdir(damage, places, capsys):
    copy = places["tmp"] / "copy"
    shutil.copytree(places["run"], copy)
    (copy / "config.json").write_text(damage)
    before = contents(copy)
    with pytest.raises(SystemExit) as left:
        main(["eval", f"--checkpoint={copy}", "--lengths=64"])
    one_sentence(capsys.readouterr().err, "config.json")
    assert left.value.code == 1
    assert contents(copy) == before


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    bad = ["--config.optim.lr=1e38", "--config.optim.warmup_steps=0", "--config.stages.base.steps=20", "--config.max_bad_steps=2"]
    ended = lcx(["train", f"--config={CONFIG}", f"--workdir={tmp_path}", *bad])
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1
    assert [line.partition(":")[0] for line in lines] == ["warning", "error"], ended.stderr
    assert "2 non-finite steps in a row, so the run stops: lower optim.lr" in lines[-1]


@pytest.mark.slow
def test_a_full_disk_while_training(places):
    workdir, more = places["tmp"] / "copy", places["tmp"] / "more.py"
    shutil.copytree(places["run"], workdir)
    before = contents(workdir / "checkpoints")
    # A stage that is added goes on from what is there.
    more.write_text(TINY.format("c.stages.more = {**c.stages.base, 'steps': 1}; c.stage_order = ('base', 'longer', 'more')"))
    ended = lcx(["train", f"--config={more}", f"--workdir={workdir}"], limit=6000)
    one_sentence(
        ended.stderr.splitlines()[-1], "free disk space or fix the disk and rerun the same command; it resumes from step 4"
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    after = contents(workdir / "checkpoints")
    assert {name: after.get(name) for name in before} == before


@pytest.mark.slow
def test_a_full_disk_while_preparing(places):
    words = ["data", "prepare", "--limit_bytes=300000", "--shard_tokens=50000", f"--out={places['new']}"]
    ended = lcx(words, limit=20_000)
    one_sentence(ended.stderr, "rerun the same command, it resumes from there")
    assert ended.returncode == 1
    assert lcx(words).returncode == 0


def test_a_value_without_effect_is_remarked(capsys):
    with pytest.raises(SystemExit):
        main(["plan", f"--config={QUICKSTART}", "--nocompile", "--config.optim.lr=0.5", "--stage=none"])
    remark, error = capsys.readouterr().err.strip().splitlines()
    assert remark.startswith("warning: --config.optim.lr=0.5 has no effect: every stage sets its own; use --config.stages.STAGE.")
    assert error.startswith("error: --stage='none' is unknown")


def test_stages_that_a_config_makes_of_its_flags(tmp_path, capsys):
    """As configs/extend_hf.py does: what every stage has there came from the flags."""
    config = tmp_path / "made.py"
    config.write_text(
        "import runpy\n"
        f"get_config = runpy.run_path({str(QUICKSTART)!r})['get_config']\n"
        "def complete(config):\n"
        "    values = config.to_dict()\n"
        "    values['stages'] = [{'name': name, **values['stages'][name]} for name in values.pop('stage_order')]\n"
        "    return type(config)(values)\n"
    )
    with pytest.raises(SystemExit):
        main(["plan", f"--config={config}", "--nocompile", "--config.optim.lr=0.5", "--stage=none"])
    one_sentence(capsys.readouterr().err, "--stage='none' is unknown")


@pytest.mark.parametrize("name", ["syntax.py", "broken.py"])
def test_the_line_of_a_config_named_from_the_folder_it_is_in(name, places, monkeypatch, capsys):
    monkeypatch.chdir(places["tmp"])
    with pytest.raises(SystemExit):
        main(["train", f"--config={name}"])
    one_sentence(capsys.readouterr().err, f"--config={WRONG['train --config={tmp}/' + name]}")


def test_errors_leave_a_process_with_status_1(places):
    ended = lcx(["theta", "--head-dim=7"])
    one_sentence(ended.stderr, "head_dim=7 must be even, at least 2 and at most 4,096, such as 8")
    assert (ended.returncode, ended.stdout) == (1, "")


def test_output_that_nobody_reads_says_nothing():
    pipe = subprocess.Popen([sys.executable, "-m", "lcx.cli", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with contextlib.suppress(OSError):
        pipe.stdout.close()
    assert pipe.stderr.read() == b""
    pipe.wait()
