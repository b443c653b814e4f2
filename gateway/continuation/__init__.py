"""An answer that broke off, gone on with elsewhere: what has been said, the request for the rest, the joint.

- `spoken`   the text that the client has seen, read out of the bytes that were relayed, and whether it is only text
- `request`  which requests can be continued, and the body that asks for the rest of an answer
- `joint`    the new stream's events as if they were the first one's, and the usage of both as one bill
- `meter`    one count of it all

Pure: bytes in, bytes out, no clock. May import `wire` and `errors`. Whom to ask is `passage.continuation`'s.

The text is given to the next engine without the blanks it ends with, since chat templates strip them; it then writes
them again, and the joint takes them out. No character is given that an engine had only begun (U+FFFD at the end).
An answer with reasoning is not continued: templates leave the reasoning of an assistant message out, and parsers take
what follows one without it for reasoning again. Nor is one in which a tool call has begun.

OpenAI API reference: https://platform.openai.com/docs/api-reference/chat-streaming; `continue_final_message` and
`add_generation_prompt`: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""
