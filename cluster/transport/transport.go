// Package transport carries messages between nodes and from gateways to nodes.
// A message is a small encoded header and at most a few payload buffers, which
// travel by reference inside a process and as raw bytes in a frame between
// processes. Kinds: grpc (bidirectional streams with a raw codec), inproc (one
// process), sim (a World with loss, delay and partitions). One conformance
// suite runs against all of them.
package transport

import (
	"context"

	"firn.io/firn/internal/payload"
)

// Limits of a message and of a frame. A frame that claims more is refused
// before anything is allocated.
const (
	// MaxHeaderBytes bounds a message's header.
	MaxHeaderBytes = 256 << 10
	// MaxPayloads bounds the payload buffers of one message.
	MaxPayloads = 256
	// MaxFrameBytes is the size at which a frame is closed; one message larger
	// than that (at most one entry) travels in a frame of its own.
	MaxFrameBytes = 1 << 20
	// MaxQueueBytes bounds what waits for one peer; what comes on top is dropped
	// (control) or held back by its sender (data), see Peer.Send.
	MaxQueueBytes = 64 << 20
)

// Class separates traffic that must not wait for bulk data.
type Class uint8

const (
	// Control is votes and heartbeats. It has its own connection.
	Control Class = iota
	// Data is appends, client operations and everything else.
	Data
)

// Type tells the receiver which decoder the header is for. Values travel.
type Type uint8

// Message types. Their headers are defined by the packages that send them.
const (
	TypeRaft      Type = 1 // raftgroup: one raft message of one group, entries' payloads attached in order
	TypeHeartbeat Type = 2 // raftgroup: coalesced heartbeats (or their answers) of a node pair
	TypeRequest   Type = 3 // cluster/wire: an operation of a gateway
	TypeResponse  Type = 4 // cluster/wire: its answer
	TypeHello     Type = 5 // first message of a connection: cluster id, sender
	TypeSpace     Type = 6 // cluster/node: how full the sender's disks are (S7)
	TypeCopy      Type = 7 // cluster/wire: a replica asks another for its state (C3)
	TypeCopied    Type = 8 // cluster/wire: the answer
)

// Message is what travels. Send takes over one hold of each payload; Receive
// hands one over. Header belongs to the receiver of the call in both
// directions: neither side touches it after passing it on.
type Message struct {
	Type     Type
	Header   []byte
	Payloads []*payload.Buf
}

// Release gives back the payloads' holds; for a message that goes nowhere.
func (m *Message) Release() {
	for _, p := range m.Payloads {
		p.Release()
	}
	m.Payloads = nil
}

// Bytes is the size on the wire without framing.
func (m *Message) Bytes() int {
	n := len(m.Header)
	for _, p := range m.Payloads {
		n += p.Len()
	}
	return n
}

// Handler receives what a peer sends. Both methods are called on the Loop that
// was given to Dial or Listen.
type Handler interface {
	// Receive takes one message. Messages of one peer and class arrive in the
	// order they were sent, or not at all.
	Receive(p Peer, m Message)
	// Closed says that the connection is gone. Messages sent before may or may
	// not have arrived. For a dialled peer, the next Send dials again.
	Closed(p Peer, err error)
}

// Peer is one end of a connection.
type Peer interface {
	// Send queues m. It never blocks. Messages are gathered until the end of
	// the loop's turn and then travel in as few frames as fit. It returns false
	// when the queue is full or the peer is closed: then m was released and
	// will not arrive. Called on the loop.
	Send(c Class, m Message) bool
	// QueuedBytes is what Send has queued and the wire has not taken.
	QueuedBytes() int
	// Addr names the other end, for logs; for a dialled peer, what was dialled.
	Addr() string
	// Close drops the connection and what is queued.
	Close()
}

// Network makes connections. Implementations belong to one process and one Loop.
type Network interface {
	// Dial returns a peer for addr at once; it connects in the background and
	// again after a loss, with backoff, as long as something is sent. ctx ends it.
	Dial(ctx context.Context, addr string, h Handler) Peer
	// Listen accepts connections on addr. h is called for every accepted peer,
	// told apart by Peer. The returned address has the real port. stop refuses
	// new connections, closes the accepted ones and returns when no handler runs.
	Listen(ctx context.Context, addr string, h Handler) (bound string, stop func(), err error)
}
