"""What a policy would do to a load: the executable model of the limiter, played in virtual time.

Nothing is measured here and nothing is contacted: what is simulated is the specification that the
property tests hold the real scripts to, asked by the product's own sessions and ledgers.

    amounts    durations and LLM tokens by chance: constant, lognormal, by percentiles
    trace      who asks for what and when; as CSV and JSON lines
    load       a described load, from which a trace is drawn
    process    one process: its session and its ledger, with a network and a clock of ours
    stage      the pool, the processes and the time
    tally      what happened, call by call and moment by moment
    findings   what that comes to: waits, shares, refusals, use, which limit binds
    play       one trace under one policy, or under several
    tables     the findings in figures and words; page, chart_text and chart_svg show them
    curves     what is drawn of them, whatever on
    history    judges a log of calls, whether it was simulated or seen at an upstream
"""
