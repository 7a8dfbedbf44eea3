"""`python -m megagpt.doctor`: what the doctor starts on each host, by ssh, the way that DeepSpeed starts ranks."""

from megagpt.doctor.agent import main

main()
