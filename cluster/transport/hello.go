package transport

import (
	"encoding/binary"

	"firn.io/firn/internal/block"
)

// Hello is the first message of every connection, from the side that dialled.
// The other side refuses it, or hands it to its Handler as the first message.
type Hello struct {
	// Cluster is what keeps nodes of two clusters apart that were given each
	// other's address.
	Cluster block.ClusterID
	// Node is the dialling node, 0 for a gateway.
	Node block.NodeID
	// Session tells the connections of one process apart from those of another,
	// and of its earlier life.
	Session uint64
}

// Identity is what a process says of itself and whom it lets in.
type Identity struct {
	Hello Hello
	// Accept, if set, refuses a connection by an error; it is called on the
	// Loop of the listening side. Without it the clusters must be equal.
	Accept func(Hello) error
}

// Check applies Accept or its default.
func (id *Identity) Check(h Hello) error {
	if id.Accept != nil {
		return id.Accept(h)
	}
	if h.Cluster != id.Hello.Cluster {
		return block.Errorf(block.Denied, "a peer of cluster %v connected to cluster %v: check the addresses in both configurations", h.Cluster, id.Hello.Cluster)
	}
	return nil
}

const (
	helloVersion = 1
	helloBytes   = 1 + 16 + 4 + 8
)

// AppendHello appends the encoding: version, cluster, node, session. It is the
// header of a TypeHello message.
func AppendHello(dst []byte, h Hello) []byte {
	dst = append(dst, helloVersion)
	dst = append(dst, h.Cluster[:]...)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(h.Node))
	return binary.LittleEndian.AppendUint64(dst, h.Session)
}

// DecodeHello is the inverse. Kinds Invalid and Unsupported.
func DecodeHello(p []byte) (Hello, error) {
	var h Hello
	if len(p) < 1 || p[0] != helloVersion {
		return h, block.Errorf(block.Unsupported, "hello of an unknown version")
	}
	if len(p) != helloBytes {
		return h, block.Errorf(block.Invalid, "hello of %d bytes", len(p))
	}
	copy(h.Cluster[:], p[1:])
	h.Node = block.NodeID(binary.LittleEndian.Uint32(p[17:]))
	h.Session = binary.LittleEndian.Uint64(p[21:])
	return h, nil
}
