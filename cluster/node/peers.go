package node

import (
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
)

// peers are the connections that this node dialled to the other nodes, by what
// the metadata store says of their addresses. It is raftgroup's Sender.
type peers struct {
	node  *Node
	addrs map[block.NodeID]string
	conns map[block.NodeID]*peerConn
}

type peerConn struct {
	peers *peers
	id    block.NodeID
	peer  transport.Peer
}

func newPeers(n *Node) *peers {
	return &peers{node: n, addrs: make(map[block.NodeID]string), conns: make(map[block.NodeID]*peerConn)}
}

// changed takes a node's value from the mirror of nodes. A node that vanished
// keeps its connection: only another address ends it.
func (ps *peers) changed(kv meta.KV) {
	if !kv.Exists() {
		return
	}
	nm, err := meta.DecodeNode(kv)
	if err != nil {
		ps.node.logf("%v", err)
		return
	}
	if nm.ID == ps.node.cfg.ID || nm.Addr == ps.addrs[nm.ID] {
		return
	}
	ps.addrs[nm.ID] = nm.Addr
	if c := ps.conns[nm.ID]; c != nil {
		delete(ps.conns, nm.ID)
		c.peer.Close()
	}
}

// Peer implements raftgroup.Sender.
func (ps *peers) Peer(id block.NodeID) transport.Peer {
	if c := ps.conns[id]; c != nil {
		return c.peer
	}
	addr := ps.addrs[id]
	if addr == "" {
		return nil
	}
	c := &peerConn{peers: ps, id: id}
	c.peer = ps.node.cfg.Network.Dial(ps.node.ctx, addr, c)
	ps.conns[id] = c
	return c.peer
}

func (ps *peers) close() {
	for _, id := range sortedKeys(ps.conns) {
		ps.conns[id].peer.Close()
	}
	clear(ps.conns)
}

// Receive implements transport.Handler: a node may answer on the connection
// that reached it.
func (c *peerConn) Receive(p transport.Peer, m transport.Message) { c.peers.node.Receive(p, m) }

// Closed implements transport.Handler.
func (c *peerConn) Closed(transport.Peer, error) {
	if c.peers.conns[c.id] == c && !c.peers.node.stopped {
		c.peers.node.host.Unreachable(c.id)
		c.peers.node.installs.lost(c.id)
	}
}
