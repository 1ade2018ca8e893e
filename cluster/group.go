package cluster

import (
	"slices"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
)

// group is what the client knows of a Raft group: where its replicas are, and
// which node leads, as far as answers have told.
//
// Commands go to the leader. While none is known, one command at a time is sent
// as a probe to the replicas in turn, and the others wait in retry; the first
// answer that tells of a leader sends them all. A node that has refused or been
// silent is passed by until the next tick, so nothing is sent in a circle.
type group struct {
	client   *Client
	id       block.GroupID
	replicas []block.NodeID
	leader   block.NodeID // 0: not known
	refused  []block.NodeID
	turn     int
	retry    []*operation
	probing  bool
}

// groupAt returns what is known of a group, which may be nothing yet.
func (c *Client) groupAt(id block.GroupID) *group {
	g := c.groups[id]
	if g == nil {
		g = &group{client: c, id: id}
		c.groups[id] = g
		c.order = append(c.order, g)
		if kv := c.groupsM.Get(meta.GroupKey(id)); kv.Exists() {
			c.groupChanged(kv)
		}
	}
	return g
}

func (c *Client) groupChanged(kv meta.KV) {
	id, err := meta.ParseGroupKey(kv.Key)
	if err != nil || !kv.Exists() {
		return
	}
	g, known := c.groups[id]
	m, err := meta.DecodeGroup(kv)
	if !known || err != nil {
		return
	}
	g.replicas = g.replicas[:0]
	for _, r := range m.Replicas {
		if !r.Dead() {
			g.replicas = append(g.replicas, r.Node)
		}
	}
	if !slices.Contains(g.replicas, g.leader) {
		g.leader = 0
	}
	if len(g.retry) > 0 {
		c.armTick()
	}
}

// refuse notes that the node did not do what the leader should.
func (g *group) refuse(node block.NodeID) {
	if g.leader == node {
		g.leader = 0
	}
	if !slices.Contains(g.refused, node) {
		g.refused = append(g.refused, node)
	}
}

// leads notes which node leads, as another one says.
func (g *group) leads(node block.NodeID) {
	if node != 0 && slices.Contains(g.replicas, node) && !slices.Contains(g.refused, node) {
		g.leader = node
	}
}

// pick returns the node to try next among those that skip does not name, healthy
// ones first; 0 for none.
func (g *group) pick(skip []block.NodeID) block.NodeID {
	second := block.NodeID(0)
	for range g.replicas {
		n := g.replicas[g.turn%len(g.replicas)]
		g.turn++
		switch {
		case slices.Contains(skip, n):
		case g.client.suspected(n):
			second = n
		default:
			return n
		}
	}
	return second
}

// submit sends op, or keeps it until there is somewhere to send it.
func (g *group) submit(op *operation) {
	if g.leader != 0 && len(g.retry) == 0 {
		if op.send(g.leader) {
			return
		}
		g.refuse(g.leader)
	}
	g.later(op)
	g.flush()
}

// later keeps op until the next flush.
func (g *group) later(op *operation) {
	op.waits = true
	g.retry = append(g.retry, op)
	g.client.armTick()
}

// flush sends what waits: all of it to a known leader, else one as a probe.
func (g *group) flush() {
	for g.leader == 0 && len(g.retry) > 0 && !g.probing {
		node := g.pick(g.refused)
		if node == 0 {
			return
		}
		op := g.next()
		if !op.send(node) {
			g.refused = append(g.refused, node)
			g.retry = slices.Insert(g.retry, 0, op)
			op.waits = true
			continue
		}
		op.probe, g.probing = true, true
		return
	}
	for n := len(g.retry); n > 0 && g.leader != 0 && len(g.retry) > 0; n-- {
		op := g.next()
		if !op.send(g.leader) {
			g.refuse(g.leader)
			g.later(op)
			return
		}
	}
}

// tick gives refused nodes another chance and sends what waits.
func (g *group) tick() {
	g.refused = g.refused[:0]
	for _, op := range slices.Clone(g.retry) {
		if op.waits && op.ctx != nil && op.ctx.Err() != nil {
			g.drop(op)
			op.givenUp()
		}
	}
	g.flush()
}

func (g *group) next() *operation {
	op := g.retry[0]
	g.retry[0] = nil
	g.retry = g.retry[1:]
	op.waits = false
	return op
}

// drop takes op out of what waits.
func (g *group) drop(op *operation) {
	if i := slices.Index(g.retry, op); i >= 0 {
		g.retry = slices.Delete(g.retry, i, i+1)
	}
	op.waits = false
}
