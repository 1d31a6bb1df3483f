"""Words for names, all of five letters so that every name has as many bytes."""

_ADJECTIVES = """
amber basic blank blunt brave brief cheap clean close crisp daily dense dizzy dusty eager empty equal faint
fresh giant grand green happy harsh heavy jolly juicy light loose lucid magic misty noble perky plain polar
proud quick quiet ready regal rigid rough round royal salty sandy sharp shiny short silly sleek snowy solar
solid sunny tidal tough urban vague vivid whole witty young
"""
_NOUNS = """
arrow bagel bench blade board brook broom brush canal chair chalk cliff cloth coast cobra couch crane creek
crown daisy eagle easel feast field frost fruit globe grass hatch horse house igloo kayak kiosk label lemon
lever lotus mango maple medal melon metal onion orbit otter paint panda quilt raven river robin rover scarf
squid table tower tulip vault vinyl wagon whale wheel zebra
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
