"""A page for people, made of Gradio's parts: a chat, and what the ranks do meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import openai
import pandas as pd

from hippo_mpi.serving.page.cluster_view import COLUMNS, ClusterView

_LOOK_S = 1.0
_FONTS = ["system-ui", "sans-serif"]  # Gradio's own come from elsewhere
CSS = "footer {display: none !important} .gradio-container {max-width: 72rem !important; width: 100%; margin: 0 auto}"


def theme() -> gr.themes.Base:
    return gr.themes.Soft(font=_FONTS, font_mono=["ui-monospace", "monospace"])


def make_page(client: openai.OpenAI, models: list[str], view: ClusterView) -> gr.Blocks:
    """The page.

    Args:
        client: of the server that answers.
        models: its catalogue.
        view: what its ranks do.
    """

    def answer(
        message: str, history: list[dict[str, Any]], model: str, system: str, temperature: float, top_p: float,
        max_tokens: int, seed: float | None,
    ) -> Iterator[str | list[gr.ChatMessage]]:  # fmt: skip
        asked = [{"role": turn["role"], "content": turn["content"]} for turn in history if not turn.get("metadata")]
        asked = [*([{"role": "system", "content": system}] if system else []), *asked]
        said = thought = ""
        try:
            pieces: Any = client.chat.completions.create(
                model=model, messages=[*asked, {"role": "user", "content": message}], stream=True,  # type: ignore[list-item]
                temperature=temperature, top_p=top_p, max_tokens=int(max_tokens), seed=None if seed is None else int(seed),
            )  # fmt: skip
            for piece in pieces:
                delta = piece.choices[0].delta
                thought += getattr(delta, "reasoning_content", None) or ""
                said += delta.content or ""
                thoughts = gr.ChatMessage(role="assistant", content=thought, metadata={"title": "Thoughts"})
                yield [thoughts, gr.ChatMessage(role="assistant", content=said)] if thought else said
        except openai.OpenAIError as error:
            body = getattr(error, "body", None)
            raise gr.Error(
                str(body.get("message") if isinstance(body, dict) else error), print_exception=False
            ) from None

    def look() -> tuple[str, list[list[str]], pd.DataFrame, pd.DataFrame]:
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
        return view.line, view.rows, frame, frame

    with gr.Blocks(title="Hippo MPI", analytics_enabled=False, fill_height=True) as page:
        state = gr.Markdown(elem_id="state")
        with gr.Tab("Chat"):
            gr.ChatInterface(
                answer,
                chatbot=gr.Chatbot(label="Answers", height="60vh", elem_id="chat", render=False),
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
                    gr.Slider(1, 4096, 256, step=1, label="Most tokens", render=False),
                    gr.Number(None, label="Seed", precision=0, render=False),
                ],
                additional_inputs_accordion=gr.Accordion("Model and sampling", open=False, render=False),
                show_progress="hidden",
            )
        with gr.Tab("Cluster"):
            ranks = gr.Dataframe(headers=list(COLUMNS), label="Ranks", interactive=False, elem_id="ranks", wrap=False)
            with gr.Row():
                busy = gr.LinePlot(
                    x="seconds", y="busy %", color="rank", y_lim=[0, 100], label="Busy share", min_width=300
                )
                hops = gr.LinePlot(
                    x="seconds", y="hop ms", color="rank", y_lim=[0, None], label="Time per hop", min_width=300
                )
        gr.Timer(_LOOK_S).tick(
            look, outputs=[state, ranks, busy, hops], show_progress="hidden", api_visibility="private"
        )
        page.load(look, outputs=[state, ranks, busy, hops], show_progress="hidden", api_visibility="private")
    return page
