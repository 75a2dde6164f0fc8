"""crewai: a crew of one, and its model alone."""

import os

from cases import GPT, KEY, OPENAI_URL, QUESTION, answered, case, run

os.environ |= {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": OPENAI_URL, "OPENAI_API_BASE": OPENAI_URL}

from crewai import LLM, Agent, Crew, Task

model = LLM(model=f"openai/{GPT}", base_url=OPENAI_URL, api_key=KEY)


@case("text")
def _():
    answered(model.call(QUESTION))


@case("crew")
def _():
    agent = Agent(role="Helper", goal="Help", backstory="You help.", llm=model)
    task = Task(description=QUESTION, expected_output="A sentence", agent=agent)
    assert Crew(agents=[agent], tasks=[task]).kickoff().raw


run()
