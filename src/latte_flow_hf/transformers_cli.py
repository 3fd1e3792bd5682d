# Copyright 2026 the latte_flow_hf contributors. Licensed under the Apache License, Version 2.0.
"""transformers' own command with the classes of this package registered, since it has no plug-ins:

    python -m latte_flow_hf.transformers_cli serve FOLDER

`transformers chat` and other clients then talk to the server as usual.
"""

# The package registers its classes when it is imported, which happens before this module.
from transformers.cli.transformers import main


if __name__ == "__main__":
    main()
