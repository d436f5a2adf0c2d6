"""Chat templates by name. Each renders the text of the published one, and has blocks around what the assistant writes.

What a block holds ends with the token by which the published models end a message. The published texts, where they are
from, and the comparison are in tests/tokenizers/test_chat_template.py.
"""

from __future__ import annotations

_CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

_ALTERNATE = """\
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('after a system message, roles must be user, assistant, user, assistant, ...') }}
    {%- endif %}"""

_LLAMA2 = """\
{%- set has_system = messages[0]['role'] == 'system' %}
{%- for message in (messages[1:] if has_system else messages) %}
ALTERNATE
    {%- if message['role'] == 'user' %}
        {%- set first = has_system and loop.first %}
        {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if first else '' %}
        {{- bos_token + '[INST] ' + (system + message['content']) | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] | trim + ' ' + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}"""

_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

_MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
ALTERNATE
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}"""

_ZEPHYR = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

_GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
ALTERNATE
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<end_of_turn>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

NAMED_TEMPLATES = {
    "chatml": _CHATML,
    "llama2": _LLAMA2.replace("ALTERNATE", _ALTERNATE),
    "llama3": _LLAMA3,
    "mistral": _MISTRAL.replace("ALTERNATE", _ALTERNATE),
    "zephyr": _ZEPHYR,
    "gemma": _GEMMA.replace("ALTERNATE", _ALTERNATE),
}
