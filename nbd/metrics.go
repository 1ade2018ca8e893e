package nbd

import (
	"sync/atomic"

	"firn.io/firn/nbd/wire"
)

// Stats counts what a server has done since it was made.
type Stats struct {
	// Connections are open now; Entered of them are in an export.
	Connections, Entered int
	// InFlightBytes is the payload held now.
	InFlightBytes int64
	// Accepted counts connections; Refused those over MaxConnections;
	// HandshakeFailures those that ended before an export was entered, other
	// than by NBD_OPT_ABORT.
	Accepted, Refused, HandshakeFailures uint64
	// Violations counts connections that ended because the client broke the
	// protocol or stalled in the transmission phase.
	Violations uint64
	// Encrypted counts connections that started TLS.
	Encrypted uint64
	// Superseded counts connections that a newer one of their session ended.
	Superseded uint64
	// Moved counts connections of clients with a Session that were closed instead
	// of an answer, because the export is not served on them any more.
	Moved uint64
	Counts
}

// Counts are summed over connections.
type Counts struct {
	// Requests by command; UnknownRequests have none.
	Requests        [wire.NumCommands]uint64
	UnknownRequests uint64
	// ReadBytes and WrittenBytes are payload of successful requests.
	ReadBytes, WrittenBytes uint64
	// MemoryReads are reads answered from lent memory.
	MemoryReads uint64
	// Errors by number, in the order of wire.Errnos.
	Errors [len(wire.Errnos)]uint64
}

func (c *Counts) add(d Counts) {
	for i := range c.Requests {
		c.Requests[i] += d.Requests[i]
	}
	for i := range c.Errors {
		c.Errors[i] += d.Errors[i]
	}
	c.UnknownRequests += d.UnknownRequests
	c.ReadBytes += d.ReadBytes
	c.WrittenBytes += d.WrittenBytes
	c.MemoryReads += d.MemoryReads
}

// counters are one connection's Counts while it lives, so that connections do
// not share cache lines.
type counters struct {
	requests                                             [wire.NumCommands]atomic.Uint64
	unknownRequests, readBytes, writtenBytes, memoryRead atomic.Uint64
	errors                                               [len(wire.Errnos)]atomic.Uint64
}

func (c *counters) request(cmd wire.Command) {
	if cmd < wire.NumCommands {
		c.requests[cmd].Add(1)
	} else {
		c.unknownRequests.Add(1)
	}
}

func (c *counters) failed(e wire.Errno) {
	for i, known := range wire.Errnos {
		if e == known {
			c.errors[i].Add(1)
		}
	}
}

func (c *counters) load() (n Counts) {
	for i := range c.requests {
		n.Requests[i] = c.requests[i].Load()
	}
	for i := range c.errors {
		n.Errors[i] = c.errors[i].Load()
	}
	n.UnknownRequests = c.unknownRequests.Load()
	n.ReadBytes = c.readBytes.Load()
	n.WrittenBytes = c.writtenBytes.Load()
	n.MemoryReads = c.memoryRead.Load()
	return n
}
