"""Gives every linear its role, from what reads it and what it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from .facts import Role
from .findings import Findings
from .flow import Origins, Trace
from .products import Product

_ATTENTION = {Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.QKV_MLP, Role.OUT, Role.OUT_MLP, Role.GATE}
_MLP = {Role.MLP_UP, Role.MLP_GATE, Role.MLP_GATE_UP, Role.MLP_DOWN}


@dataclass
class Reader:
    """A linear that reads another one's value, and what lies between."""

    node: fx.Node
    trace: Trace


@dataclass
class Roles:
    """Assigns roles in order of how much they say: attention, MLP, conditioning, place.

    ``in_block`` tells whether a node lies in a block; ``before`` and ``after`` whether it lies before the first and
    behind the last block (or attention, without blocks) on its way.
    """

    found: Findings
    in_block: Callable[[fx.Node], bool]
    before: Callable[[fx.Node], bool]
    after: Callable[[fx.Node], bool]
    roles: dict[fx.Node, Role] = field(default_factory=dict)
    readers: dict[fx.Node, list[Reader]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def assign(self) -> dict[fx.Node, Role]:
        """The role of every product with a weight."""
        for product in self.found.products.values():
            for producer, trace in self._into(product).items():
                self.readers.setdefault(producer, []).append(Reader(product.node, trace))
        self._operands()
        self._outputs()
        self._mlps()
        self._gates()
        self._low_rank()
        self._parts()
        for node, product in self.found.products.items():
            if node in self.roles and not (self.roles[node] in _MLP and not self._inside(node)):
                continue
            self.roles[node] = self._placed(node) if self.found.on_tokens(node) else self._conditioning(product)
        return self.roles

    def _into(self, product: Product) -> Origins:
        return self.found.trace.of(product.source)

    def _inside(self, node: fx.Node) -> bool:
        return self.in_block(node) or not (self.before(node) or self.after(node))

    # --- attention ---------------------------------------------------------------------------------------------------

    def _operands(self) -> None:
        """Query, key, value: by which operands of attentions a linear makes."""
        makes: dict[fx.Node, set[Role]] = {}
        for site in self.found.sites.values():
            for operand, role in ((site.query, Role.QUERY), (site.key, Role.KEY), (site.value, Role.VALUE)):
                for producer in self.found.trace.of(operand):
                    if producer in self.found.products:
                        makes.setdefault(producer, set()).add(role)
        for producer, made in makes.items():
            self.roles[producer] = next(iter(made)) if len(made) == 1 else Role.QKV

    def _outputs(self) -> None:
        """What reads an attention; beside an MLP's value, it closes a parallel block and its opener is ``qkv_mlp``."""
        for product in self.found.products.values():
            origins = self._into(product)
            if not any(producer in self.found.sites for producer in origins):
                continue
            beside = {
                producer
                for producer, trace in origins.items()
                if producer in self.found.products and trace.activated and trace.beside
            }
            if product.node in self.roles and not beside:
                continue  # an attention that reads another one directly
            self.roles[product.node] = Role.OUT_MLP if beside else Role.OUT
            for producer in beside:
                if self.roles.get(producer) in (Role.QKV, Role.VALUE, Role.KEY, Role.QUERY):
                    self.roles[producer] = Role.QKV_MLP
                else:
                    self._open_mlp(producer, product.node)

    def _gates(self) -> None:
        """Linears whose squashed value multiplies an attention's output."""
        for a, trace_a, b, trace_b in self.found.trace.gates:
            for site, gate, trace in ((a, b, trace_b), (b, a, trace_a)):
                if site in self.found.sites and trace.activated and gate in self.found.products:
                    self.roles.setdefault(gate, Role.GATE)

    # --- MLP ---------------------------------------------------------------------------------------------------------

    def _mlps(self) -> None:
        """A linear that reads activated values of linears closes an MLP; it and they are on the token path."""
        for product in self.found.products.values():
            if not self.found.on_tokens(product.node):
                continue
            opened = [p for p, trace in self._into(product).items() if trace.activated or trace.gated]
            into = self._into(product)
            if not opened or any(p in self.found.sites for p in into):
                continue
            if not any(into[p].activated for p in opened) and not self._bilinear(opened):
                continue
            fused = [p for p in opened if self.roles.get(p) in (Role.QKV, Role.QKV_MLP)]
            for producer in fused:
                self.roles[producer] = Role.QKV_MLP
            if product.node not in self.roles:
                self.roles[product.node] = Role.MLP_DOWN
            for producer in opened:
                if producer in self.found.products:
                    self._open_mlp(producer, product.node)

    def _bilinear(self, opened: list[fx.Node]) -> bool:
        return sum(p in self.found.products for p in opened) > 1

    def _open_mlp(self, producer: fx.Node, closing: fx.Node) -> None:
        if producer in self.roles or not self.found.on_tokens(producer):
            return
        gates = self.found.trace.gates
        for a, trace_a, b, trace_b in gates:
            if producer is a and producer is b:
                self.roles[producer] = Role.MLP_GATE_UP
                return
            mine, other = (trace_a, trace_b) if producer is a else (trace_b, trace_a)
            partner = b if producer is a else a
            if producer in (a, b) and partner in self.found.products and mine.activated and not other.activated:
                self.roles[producer] = Role.MLP_GATE
                return
        self.roles[producer] = Role.MLP_UP

    def _low_rank(self) -> None:
        """A linear read by linears of one attention role alone, nothing but a norm between, is a part of them."""
        for node in reversed(list(self.found.products)):
            readers = self.readers.get(node, [])
            if node in self.roles or not readers or not self.found.on_tokens(node) or not self._inside(node):
                continue
            said = {self.roles.get(reader.node) for reader in readers}
            plain = not any(reader.trace.activated or reader.trace.gated for reader in readers)
            alone = self._feeds_only(node, {reader.node for reader in readers})
            role = next(iter(said)) if len(said) == 1 else None
            if plain and alone and role is not None and role in _ATTENTION | _MLP and role != Role.OUT:
                self.roles[node] = role

    def _parts(self) -> None:
        """What is summed into one layer (an adapter's second half) has the role of the layer."""
        for layer in self.found.trace.layers:
            said = {self.roles[node] for node in layer if node in self.roles}
            if len(said) == 1:
                for node in layer:
                    self.roles.setdefault(node, next(iter(said)))

    def _feeds_only(self, node: fx.Node, readers: set[fx.Node]) -> bool:
        """Whether nothing but ``readers`` uses a value, views and norms of it included."""
        pending, seen = list(node.users), set()
        while pending:
            user = pending.pop()
            if user in readers or user in seen:
                continue
            seen.add(user)
            if node not in self.found.trace.of(user):
                return False
            pending.extend(user.users)
        return True

    # --- conditioning ------------------------------------------------------------------------------------------------

    def _conditioning(self, product: Product) -> Role:
        """Without token axis: embedders of the timestep and of other inputs, and what turns them to modulation."""
        meeting = self.found.trace.meetings.get(product.node)
        readers = [r for r in self.readers.get(product.node, []) if r.node is not product.node]
        embeds = [r for r in readers if not self.found.on_tokens(r.node)]
        if meeting is not None and not meeting.joins:
            closes = not embeds or all(self.roles.get(r.node) == Role.MODULATION for r in embeds)
            if closes and (meeting.multiplies or meeting.cut or self.in_block(product.node)):
                return Role.MODULATION
        if embeds and meeting is None and self._is_low_rank_modulation(product, embeds):
            return Role.MODULATION
        mask = self.found.flow.inputs.get(product.node, 0)
        timestep = self.found.timestep
        if timestep is not None and self.found.flow.names(mask) == [timestep.name]:
            return Role.TIMESTEP
        if mask:
            return Role.CONDITIONING
        return Role.UNKNOWN

    def _is_low_rank_modulation(self, product: Product, embeds: list[Reader]) -> bool:
        """The first of two linears without activation between, the second of which modulates."""
        if product.N >= product.K or any(reader.trace.activated for reader in embeds):
            return False
        return all(self._modulates(reader.node) for reader in embeds)

    def _modulates(self, node: fx.Node) -> bool:
        meeting = self.found.trace.meetings.get(node)
        return meeting is not None and not meeting.joins and not self.readers.get(node)

    # --- place -------------------------------------------------------------------------------------------------------

    def _placed(self, node: fx.Node) -> Role:
        if self.in_block(node):
            return Role.TOKEN
        if self.before(node):
            return Role.EMBEDDER
        if self.after(node):
            return Role.HEAD
        return Role.TOKEN
