"""Which parameters are searched, and the coordinates an optimizer sees them in.

``full``        every parameter
``biases``      every bias, and the head (BitFit, Ben Zaken et al. 2022)
``norms``       scales and shifts of the layers that normalise, and the head (Qi et al. 2022)
``head``        what sits on top of the encoder
``lora``        low-rank factors on every linear layer of the encoder, and the head (Hu et al. 2022)
``projection``  a random subspace of ``full``: each parameter follows one of k coordinates, with a random
                sign (a sparse embedding, Clarkson & Woodruff 2013; random subspaces: Li et al. 2018)
``prompt``      a random subspace of a soft prompt, vectors read before each text (black-box tuning, Sun et
                al. 2022), or with ``dimension=0`` its elements; nothing else, not the head either

In the first five, coordinates are the parameters' own elements, one tensor after another. With
``encoder_scale=s`` a coordinate of the encoder moves its element by s: a fresh head can then learn at its own
pace without shaking what is already trained under it (discriminative rates: Howard & Ruder 2018). In
``prompt`` a coordinate moves its elements by s standard deviations of the words' embeddings, in either form.
"""

from pipeline.space.kinds import build, check_held, parse, prepare_model
from pipeline.space.memory import Group, Searched
from pipeline.space.projection import Projection
from pipeline.space.searched import Space

__all__ = ["Group", "Projection", "Searched", "Space", "build", "check_held", "parse", "prepare_model"]
