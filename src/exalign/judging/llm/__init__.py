"""A language model as judge: two answers in both orders, every request and answer kept.

`pairs` chooses what is compared, `instructions` words the question and reads the answer, `exchanges` keeps what was
said, `endpoint` and `local` are who is asked, `asking` is the one loop, `summary` turns the answers into numbers, and
`commands` are `exalign judge` and `exalign grade-judge`.
"""
