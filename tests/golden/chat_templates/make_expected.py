"""Renders recipes/chat_templates/*.jinja with transformers' own Jinja environment.

    pip install transformers==5.24.0 Jinja2==3.1.6   # no torch needed
    python tests/golden/chat_templates/make_expected.py

Writes expected.json beside this file: the conversations, and for each template, conversation and
`add_generation_prompt` the text and the character spans of its generation blocks, or that the
template refuses the conversation.
"""

import json
from pathlib import Path

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent
TEMPLATES = HERE.parents[2] / "recipes" / "chat_templates"
VERSIONS = {"transformers": "5.24.0", "jinja2": "3.1.6"}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a <city>'s day",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "its name, as in Zürich"}},
            "required": ["city"],
        },
    },
}


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def tool(content, call_id="abcdefghi"):
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def call(arguments, call_id="abcdefghi"):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def conversation(name, messages, **more):
    return {"name": name, "messages": messages, **more}


WEATHER = [user("Weather?"), assistant("", tool_calls=[call({"city": "Zürich"})]), tool("sunny"), assistant("It is sunny.")]
THINKING = [
    user("2 + 2?"),
    assistant("4", reasoning_content="two and two"),
    user("3 + 3?"),
    assistant("\n6", reasoning_content="\nthree and three\n"),
]

CONVERSATIONS = [
    conversation("user_only", [user("Hello")]),
    conversation("one_turn", [user("Hello"), assistant("Hi there.")]),
    conversation("system", [system("Be brief."), user("Hello"), assistant("Hi.")]),
    conversation("multi_turn", [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]),
    conversation("multi_turn_system", [system("Sys."), user("a"), assistant("b"), user("c"), assistant("d")]),
    conversation("unicode", [system("Sei kurz – ünïcödé"), user("你好 👩‍👩‍👧"), assistant("Zu\u0308rich é 🎉")]),
    conversation("white_space", [system("  sys \n"), user("\n\n hello  "), assistant("  hi \n\n"), user("x\n"), assistant("\n y ")]),
    conversation("markup", [user("{{ x }} {% y %} <b>&amp;</b>"), assistant("```python\nprint('{%')\n```</s>")]),
    conversation("empty", [system(""), user(""), assistant("")]),
    conversation("consecutive_user", [user("a"), user("b"), assistant("c")]),
    conversation("assistant_first", [assistant("a"), user("b"), assistant("c")]),
    conversation("thinking", THINKING),
    conversation("thinking_off", [user("2 + 2?"), assistant("4")], kwargs={"enable_thinking": False}),
    conversation("thinking_inline", [user("2 + 2?"), assistant("<think>\ntwo and two\n</think>\n\n4")]),
    conversation("tools_listed", [system("Sys."), user("Weather?"), assistant("Where?")], tools=[TOOL]),
    conversation("tool_call", WEATHER, tools=[TOOL]),
    conversation("tool_call_without_content", [WEATHER[0], {"role": "assistant", "tool_calls": [call({"city": "A"})]}, *WEATHER[2:]], tools=[TOOL]),
    conversation("tool_call_with_content", [WEATHER[0], assistant("I look.", tool_calls=[call({"city": "A", "days": 1.5, "now": True, "unit": None})], reasoning_content="needs the tool"), *WEATHER[2:]], tools=[TOOL]),
    conversation("tool_call_as_text", [WEATHER[0], assistant("", tool_calls=[call('{"city": "A"}')]), *WEATHER[2:]], tools=[TOOL]),
    conversation("two_tool_calls", [WEATHER[0], assistant("", tool_calls=[call({"city": "A"}), call({"city": "B"}, "123456789")]), tool("1"), tool("2", "123456789"), assistant("Both.")], tools=[TOOL]),
    conversation("date", [user("a"), assistant("b")], tools=[TOOL], kwargs={"date_string": "1 Jan 2030", "tools_in_user_message": False}),
    conversation("parts", [user([{"type": "text", "text": "a"}]), assistant([{"type": "text", "text": "b"}])]),
]


def render(source, chat, add_generation_prompt):
    try:
        texts, spans = render_jinja_template(
            conversations=[chat["messages"]],
            tools=chat.get("tools"),
            chat_template=source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=add_generation_prompt,
            **{**TOKENS, **chat.get("kwargs", {})},
        )
    except (jinja2.exceptions.TemplateError, TypeError):
        return {"refused": True}
    return {"text": texts[0], "spans": spans[0]}


def main():
    found = {"transformers": transformers.__version__, "jinja2": jinja2.__version__}
    assert found == VERSIONS, f"made with {VERSIONS}, not {found}"
    cases = []
    for path in sorted(TEMPLATES.glob("*.jinja")):
        for chat in CONVERSATIONS:
            ends_with_assistant = chat["messages"][-1]["role"] == "assistant"
            for prompt in [False] if ends_with_assistant else [False, True]:
                case = {"template": path.stem, "conversation": chat["name"], "add_generation_prompt": prompt}
                cases.append({**case, **render(path.read_text(encoding="utf-8"), chat, prompt)})
    expected = {"versions": VERSIONS, "variables": TOKENS, "conversations": CONVERSATIONS}
    head = json.dumps(expected, ensure_ascii=False, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / "expected.json").write_text(f'{head},\n "cases": [\n{lines}\n ]\n}}\n', encoding="utf-8")


main()
