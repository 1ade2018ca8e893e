// Package e2e tests the built firn binary with the clients that people use:
// nbdcopy, nbdinfo, nbdfuse, qemu-img, qemu-io, fio, file systems over a loop
// device, libnbd from Python. Everything runs as real processes on free ports
// and in temporary folders, and is killed by process group when a test ends.
// A client that is missing fails the test; `make test` installs them.
package e2e
