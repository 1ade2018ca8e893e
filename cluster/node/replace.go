package node

import (
	"cmp"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/raftgroup"
)

// pursue takes the replacements of members one step further in the groups that
// this node leads.
func (o *orders) pursue() {
	for _, id := range sortedKeys(o.groups) {
		g := o.groups[id]
		rep := o.node.replicas[id]
		if rep != nil && rep.group != nil && rep.group.Leading() && g.Joining() && !o.busy[id] {
			o.replace(g, rep.group)
		}
	}
}

// replace follows one order: once the new replica is made, the group takes it
// in, and the store is told of how that ended. One that was given up is undone.
func (o *orders) replace(g meta.GroupMeta, group *raftgroup.Group) {
	order := raftgroup.Order{Base: cmp.Or(g.ConfVersion, raftgroup.InitialIndex)}
	var joining meta.ReplicaMeta
	for _, r := range g.Replicas {
		switch {
		case r.Joining:
			joining, order.GivenUp = r, r.GivenUp
			order.Add = append(order.Add, raftgroup.Member{Replica: r.Replica, Node: r.Node})
		case r.Leaving:
			order.Remove = append(order.Remove, r.Replica)
		}
	}
	if !joining.Created && !joining.GivenUp {
		return
	}
	state := group.Pursue(order)
	if state == raftgroup.OrderOpen {
		return
	}
	n, conf := o.node, group.Conf()
	now := meta.Membership{Index: conf.Index, Last: conf.LastReplica}
	for _, m := range conf.Members {
		now.Members = append(now.Members, m.Replica)
	}
	n.logf("group %d: replica %d takes its place: done %v, members as of entry %d", g.ID, joining.Replica, state == raftgroup.OrderDone, conf.Index)
	o.tell(g.ID, func() error { return meta.EndReplacement(n.ctx, n.cfg.Meta, g.ID, joining.Replica, now) }, func() {})
}
