"""What coordinator and sites share when they run for weeks on machines of their own.

Where their files lie, keys and certificates, join codes, and the supervision of processes. It is
the one stage of the core that opens ports and starts processes.
"""
