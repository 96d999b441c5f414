"""The web page, built with Gradio: a chat, and the activity of the ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import openai
import pandas as pd

from hippo_mpi.serving.page.cluster_view import ClusterView

_LOOK_INTERVAL_S = 1.0
_FONTS = ["system-ui", "sans-serif"]  # Gradio's default fonts would be fetched from the Internet
CSS = """
footer {display: none !important}
.gradio-container {max-width: 72rem !important; width: 100%; margin: 0 auto}
#chat .top-panel {position: static; width: fit-content; margin-left: auto}  /* else it lies on the answers */
#chat .thought:not(:first-child) .thought-group {border: none; padding: 0; margin: 0; pointer-events: none}  /* a rate */
#chat .thought:not(:first-child) .arrow {display: none}
#chat .thought:not(:first-child) p {font-size: var(--text-sm); opacity: 0.7}
#ranks table {width: 100%}
#ranks table, #ranks tr {border: none}
#ranks td, #ranks th {padding: 0.5rem; text-align: left; border: none; border-bottom: 1px solid var(--border-color-primary)}
@media (max-width: 600px) {  /* a card per rank */
  #ranks thead {display: none}
  #ranks tr {display: grid; grid-template-columns: 1fr 1fr; margin-bottom: 1rem; background: var(--block-background-fill)}
  #ranks td::before {content: attr(data-name); display: block; font-size: var(--text-sm); opacity: 0.7}
}
"""


def theme() -> gr.themes.Base:
    """Return the page's theme, with fonts that browsers have."""
    return gr.themes.Soft(font=_FONTS, font_mono=["ui-monospace", "monospace"])


def make_page(client: openai.OpenAI, models: list[str], view: ClusterView) -> gr.Blocks:
    """Build the page.

    Args:
        client: of the server.
        models: names of its models.
        view: of its ranks.
    """
    with gr.Blocks(title="Hippo MPI", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown("# Hippo MPI")
        state = gr.Markdown(elem_id="state")
        with gr.Tab("Chat"):
            _add_chat(client, models)
        with gr.Tab("Cluster"):
            ranks = gr.HTML(elem_id="ranks")
            with gr.Row():
                busy = gr.LinePlot(
                    x="seconds", y="busy %", color="rank", y_lim=[0, 100], label="Busy share", min_width=300
                )
                hops = gr.LinePlot(
                    x="seconds", y="hop ms", color="rank", y_lim=[0, None], label="Time per hop", min_width=300
                )

        def look() -> tuple[str, str, pd.DataFrame, pd.DataFrame]:
            view.look()
            points = view.points
            frame = pd.DataFrame(
                {
                    "seconds": [point.seconds for point in points],
                    "rank": [point.rank for point in points],
                    "busy %": [point.busy for point in points],
                    "hop ms": [point.hop_ms for point in points],
                }
            )
            return view.line, view.html, frame, frame

        shown = [state, ranks, busy, hops]
        gr.Timer(_LOOK_INTERVAL_S).tick(look, outputs=shown, show_progress="hidden", api_visibility="private")
        page.load(look, outputs=shown, show_progress="hidden", api_visibility="private")
    return page


def _add_chat(client: openai.OpenAI, models: list[str]) -> None:
    def answer(
        message: str, history: list[dict[str, Any]], model: str, system: str, temperature: float, top_p: float,
        max_tokens: int, seed: float | None,
    ) -> Iterator[list[gr.ChatMessage]]:  # fmt: skip
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in history if not turn.get("metadata")]
        first = [{"role": "system", "content": system}] if system else []
        options: dict[str, Any] = {
            "model": model, "messages": [*first, *asked, {"role": "user", "content": message}], "temperature": temperature,
            "top_p": top_p, "max_tokens": int(max_tokens), "seed": None if seed is None else int(seed),
        }  # fmt: skip
        try:
            yield from _answer(client, options)
        except openai.OpenAIError as error:
            body = getattr(error, "body", None)
            raise gr.Error(
                str(body.get("message") if isinstance(body, dict) else error), print_exception=False
            ) from None

    gr.ChatInterface(
        answer,
        chatbot=gr.Chatbot(show_label=False, buttons=["copy"], height="60vh", elem_id="chat", render=False),
        textbox=gr.Textbox(
            placeholder="Ask something",
            show_label=False,
            submit_btn=True,
            stop_btn=True,
            elem_id="message",
            render=False,
        ),
        additional_inputs=[
            gr.Dropdown(models, value=models[0], label="Model", render=False),
            gr.Textbox("", label="System prompt", render=False),
            gr.Slider(0, 2, 0.0, step=0.05, label="Temperature", render=False),
            gr.Slider(0.05, 1, 1.0, step=0.05, label="Top p", render=False),
            gr.Slider(1, 4096, 256, step=1, label="Max tokens", render=False),
            gr.Number(None, label="Seed", precision=0, render=False),
        ],
        additional_inputs_accordion=gr.Accordion("Model and sampling", open=False, render=False),
        show_progress="hidden",
    )


def _answer(client: openai.OpenAI, options: dict[str, Any]) -> Iterator[list[gr.ChatMessage]]:
    """Yield the messages of an answer as it grows; at the end with its rate.

    Raises:
        openai.OpenAIError: the server refuses the request, or doesn't answer any more.
    """
    said = thought = rate = ""
    times: list[float] = []
    for piece in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        if piece.usage is not None:
            rate = _rate(piece.usage.completion_tokens, times)
        for choice in piece.choices:
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            said += choice.delta.content or ""
        if said or thought:
            times.append(time.monotonic())
        yield _bubbles(thought, said, rate)


def _bubbles(thought: str, said: str, rate: str) -> list[gr.ChatMessage]:
    """Return the messages that show an answer; those with a title aren't sent back to the model."""
    parts = [gr.ChatMessage(role="assistant", content=thought, metadata={"title": "Thoughts"})] if thought else []
    parts.append(gr.ChatMessage(role="assistant", content=said))
    if rate:
        parts.append(gr.ChatMessage(role="assistant", content="", metadata={"title": rate, "status": "done"}))
    return parts


def _rate(num_tokens: int, times: list[float]) -> str:
    """Return the number of tokens, and their rate if the times (in seconds) at which pieces came show one."""
    tokens = f"{num_tokens:,} token{'s' * (num_tokens != 1)}"
    took_s = times[-1] - times[0] if times else 0.0
    return f"{tokens}, {(num_tokens - 1) / took_s:.1f} tok/s" if num_tokens > 1 and took_s > 0 else tokens
